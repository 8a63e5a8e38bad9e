"""What a run writes down about itself: `metrics.jsonl` and the progress on standard error.

Owns the sums between two logged lines and their way through a checkpoint; refuses to know what a
loss part means.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from aimv2_mllm.disk import replace_file
from aimv2_mllm.errors import RunFailed

# The fields that differ between two runs of the same recipe; all others are equal bit for bit.
TIMED_FIELDS = frozenset(
    {"samples_per_s", "targets_per_s", "mfu", "memory_gib", "accelerator_gib", "seconds", "flops"}
)
METRICS_FILE = "metrics.jsonl"
SECONDS_BETWEEN_PLAIN_LINES = 10.0


@dataclass
class _Window:
    """Sums over the steps since the last logged line."""

    steps: int = 0
    samples: int = 0
    targets: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)


@dataclass
class Step:
    """What one step tells: the loss parts and the gradient's norm, and counts over all ranks."""

    values: dict[str, float]
    targets: dict[str, int]  # by kind
    skipped: dict[str, int]  # rows left out, by reason
    samples: int
    flops: float
    seconds: float = 0.0


@dataclass
class Progress:
    """How far a run is: counts from its first step on, seconds and floating-point operations of all
    sessions, the last line."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    targets: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    window: _Window = field(default_factory=_Window)

    def add(self, step: Step) -> None:
        """Count one finished step."""
        self.step += 1
        self.samples += step.samples
        self.seconds += step.seconds
        self.flops += step.flops
        self.window.steps += 1
        self.window.samples += step.samples
        self.window.targets += sum(step.targets.values())
        self.window.seconds += step.seconds
        self.window.flops += step.flops
        add_to(self.targets, step.targets)
        add_to(self.skipped, step.skipped)
        add_to(self.window.sums, step.values)

    def close_line(
        self, rates: dict[str, float], peak: float, device: torch.device
    ) -> dict[str, Any]:
        """The line to log now; loss parts and gradient norm are means since the line before.

        `mfu` is the share of `peak`, the operations per second of all devices, that was used.
        """
        window, self.window = self.window, _Window()
        self.last = {
            "step": self.step,
            "samples": self.samples,
            "tokens": sum(self.targets.values()),
            **{f"targets_{kind}": count for kind, count in self.targets.items()},
            **{f"skipped_{reason}": count for reason, count in sorted(self.skipped.items())},
            **{name: total / window.steps for name, total in window.sums.items()},
            **{f"lr_{part}": rate for part, rate in rates.items()},
            "samples_per_s": round(window.samples / window.seconds, 3),
            "targets_per_s": round(window.targets / window.seconds, 3),
            "mfu": float(f"{window.flops / window.seconds / peak:.4g}"),
            **peak_memory(device),
            "seconds": round(self.seconds, 3),
            "flops": float(f"{self.flops:.6g}"),
        }
        return self.last

    def summary(self) -> dict[str, Any]:
        """What a caller tells of the run: steps, samples, seconds, and the last logged line."""
        return {
            "steps": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "last": self.last,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON; floats come back from it bit for bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Progress:
        """What `to_json` gave."""
        return cls(**{**stored, "window": _Window(**stored["window"])})


def add_to(totals: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Add `values` to the `totals` of the same names."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0) + value


def peak_memory(device: torch.device) -> dict[str, float]:
    """The largest memory this process has had, in GiB: resident, and on a CUDA `device`."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    memory = {"memory_gib": round(peak / (2**30 if sys.platform == "darwin" else 2**20), 3)}
    if device.type == "cuda":
        memory["accelerator_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return memory


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add `line` to the JSON-lines file `path`; `RunFailed` when the disk does not take it."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
    except OSError as error:
        raise RunFailed(
            f"{path} could not be written: {error.strerror}; the checkpoints are as they were: "
            "free some space there and run the same command"
        ) from error


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after `step` and a half-written last one from `path`, atomically.

    Raises `RunFailed` when the disk does not take it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        # What follows the last line end is empty or half-written.
        lines = content.split(b"\n")[:-1]
        kept = b"".join(
            line + b"\n" for line in lines if _is_whole(line) and json.loads(line)["step"] <= step
        )
        if kept != content:
            replace_file(path, kept)
    except OSError as error:
        raise RunFailed(f"{path} could not be cut back to step {step}: {error.strerror}") from error


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line)["step"], int)
    except (ValueError, KeyError, TypeError):
        return False


class ProgressBar:
    """A bar on a terminal; elsewhere a line at the first and last `unit` and every ten seconds."""

    def __init__(self, total: int, done: int = 0, *, unit: str, is_shown: bool = True) -> None:
        self._total, self._first, self._unit, self._is_shown = total, done, unit, is_shown
        self._started = self._told = time.monotonic()
        on_terminal = is_shown and sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=done, unit=unit, file=sys.stderr) if on_terminal else None
        )

    @property
    def seconds(self) -> float:
        """Since it began; never 0."""
        return max(time.monotonic() - self._started, 1e-9)

    def show(self, done: int, text: str) -> None:
        """Say that so many are done, what `text` tells of that, and the time left."""
        now, at_an_end = time.monotonic(), done in (self._first + 1, self._total)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._is_shown and (at_an_end or now - self._told >= SECONDS_BETWEEN_PLAIN_LINES):
            self._told = now
            seconds_left = (self._total - done) * self.seconds / (done - self._first)
            left = tqdm.format_interval(seconds_left)
            print(
                f"{self._unit} {done}/{self._total}: {text}, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Leave the terminal to others."""
        if self._bar is not None:
            self._bar.close()
