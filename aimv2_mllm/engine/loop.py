"""The training loop: one page for every stage, exact across interruptions.

Owns the order of a step and what happens when a run is stopped; refuses to know which stage, model
or loss it trains.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from aimv2_mllm.engine import checkpoint, metrics
from aimv2_mllm.engine.memory import keep_freed_memory
from aimv2_mllm.engine.optimizer import (
    Parts,
    build_optimizer,
    restore,
    set_learning_rates,
    training_tensors,
)
from aimv2_mllm.engine.precision import autocast
from aimv2_mllm.errors import RunFailed, UsageError

if TYPE_CHECKING:
    from aimv2_mllm.recipe import TrainConfig

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"

Batches = Callable[[int], Sequence[Mapping[str, Any]]]


class Loss(Protocol):
    """A NamedTuple of scalars: `total` is what is minimised, the others are its parts by name."""

    @property
    def total(self) -> Tensor: ...

    def _asdict(self) -> dict[str, Tensor]: ...


class Objective(Protocol):
    """What stands between model and loop."""

    def targets(self, batch: Any) -> dict[str, int]:
        """How many targets `batch` has, by kind."""

    def __call__(self, model: nn.Module, batch: Any, totals: dict[str, int]) -> Loss:
        """The batch's sums over the whole step's `totals`, so that micro-batches add up."""


def train(
    model: nn.Module,
    parts: Parts,
    objective: Objective,
    batches: Batches,
    *,
    config: TrainConfig,
    seed: int,
    folder: Path,
    fingerprint: str,
    narrate: Callable[[str], None],
) -> dict[str, Any]:
    """Train `parts` of `model` in place, from the newest checkpoint in `folder` on.

    Gives steps, samples, seconds and last, the last line of `metrics.jsonl`. `batches(step)`,
    0-based, is the step's micro-batches; it must be a pure function of the step with generators of
    its own, for it may run in another thread. Interrupted anywhere and started again, the weights
    and the metrics (`metrics.TIMED_FIELDS` aside) are those of an uninterrupted run, bit for bit.
    Raises `RunFailed` (loss not finite, disk full), `UsageError` (checkpoint of another run,
    unknown part), and after a signal and a saved checkpoint `KeyboardInterrupt` (SIGINT) or
    `SystemExit(143)` (SIGTERM).
    """
    keep_freed_memory()
    run = _Run(model.train(), parts, build_optimizer(parts, config), config, folder, fingerprint)
    with _StopRequest() as stop:
        progress = run.resume(narrate)
        mark = time.perf_counter()
        upcoming = _prepared(batches, progress.step, config.steps, ahead=_worth_a_thread(model))
        with closing(upcoming), metrics.ProgressBar(progress, config.steps) as bar:
            for step, micro_batches in upcoming:
                torch.manual_seed(_step_seed(seed, step))
                rates = set_learning_rates(run.optimizer, step, config)
                values, targets = run.gradients(objective, micro_batches)
                _demand_finite(values, step, run)
                run.optimizer.step()
                seconds, mark = time.perf_counter() - mark, time.perf_counter()
                progress.add(values, targets, samples=config.batch_size, seconds=seconds)
                bar.show(loss=values["total"], lr=max(rates.values()))
                if _is_due(step, config.log_every, config.steps):
                    metrics.append_line(folder / METRICS, progress.close_line(rates))
                stopping = stop.requested
                if stopping or _is_due(step, config.checkpoint_every, config.steps):
                    run.save(progress)
                if stopping:
                    break
        if stop.requested:
            narrate(f"stopped after step {progress.step}; the same command goes on from there")
    return progress.summary()


@dataclass
class _Run:
    """What a step changes, and its way to disk and back."""

    model: nn.Module
    parts: Parts
    optimizer: AdamW
    config: TrainConfig
    folder: Path
    fingerprint: str

    def __post_init__(self) -> None:
        everywhere = dict(self.model.named_parameters())
        given = {name: parameter for named in self.parts.values() for name, parameter in named}
        strange = [
            name for name, parameter in given.items() if everywhere.get(name) is not parameter
        ]
        assert not strange, f"not the model's parameters of these names: {strange[:5]}"
        trainable = {name for name, parameter in everywhere.items() if parameter.requires_grad}
        odd = sorted(trainable ^ set(given))
        assert not odd, f"trainable and in no part, or in a part and frozen: {odd[:5]}"

    def resume(self, narrate: Callable[[str], None]) -> metrics.Progress:
        """How far the newest whole checkpoint is, restored; the metrics are cut back to it."""
        found = checkpoint.load_newest(self.folder / CHECKPOINTS, self.fingerprint, narrate)
        progress = metrics.Progress()
        if found is not None:
            step, tensors, state = found
            if step > self.config.steps:
                raise UsageError(
                    f"{self.folder} is at step {step} already, beyond steps = {self.config.steps}"
                )
            restore(self.model, self.parts, self.optimizer, tensors)
            progress = metrics.Progress.from_json(state["progress"])
            narrate(f"continuing from step {step}")
        metrics.cut_back(self.folder / METRICS, progress.step)
        return progress

    def save(self, progress: metrics.Progress) -> None:
        """Write a checkpoint; the metrics reach the disk before it does."""
        metrics.sync(self.folder / METRICS)
        tensors = training_tensors(self.model, self.parts, self.optimizer)
        state = {"fingerprint": self.fingerprint, "progress": progress.to_json()}
        keep = self.config.keep_checkpoints
        checkpoint.save(self.folder / CHECKPOINTS, progress.step, tensors, state, keep=keep)

    def gradients(
        self, objective: Objective, micro_batches: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, float], dict[str, int]]:
        """The step's loss parts with `grad_norm`, and its targets by kind.

        The clipped gradients are left in the model.
        """
        assert micro_batches, "a step without a batch"
        totals: dict[str, int] = {}
        for batch in micro_batches:
            for kind, count in objective.targets(batch).items():
                totals[kind] = totals.get(kind, 0) + count
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        device = _device(self.model)
        for batch in micro_batches:
            on_device = {name: _moved(value, device) for name, value in batch.items()}
            with autocast(device, self.config.precision):
                loss = objective(self.model, on_device, totals)
            torch.autograd.backward(loss.total)
            for name, value in loss._asdict().items():
                sums[name] = sums.get(name, 0) + value.detach().float()
        trained = [parameter for named in self.parts.values() for _, parameter in named]
        sums["grad_norm"] = clip_grad_norm_(trained, self.config.clip).float()
        # One transfer for all of them: each would stop an accelerator.
        return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)), totals


class _StopRequest:
    """While entered, SIGINT or SIGTERM only sets `requested`; a second SIGINT stops at once.

    Leaving restores the old handlers and raises what the signal asks for.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._replaced: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self._signal is not None

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # One that the parent has turned off (nohup, a job in the background) stays off.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._replaced[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.requested:
            # No print: a handler may run in the middle of one.
            os.write(
                2, b"\nstopping after this step and a checkpoint; Ctrl-C again stops at once\n"
            )
        self._signal = number

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.requested and kind is None:
            raise (
                KeyboardInterrupt
                if self._signal == signal.SIGINT
                else SystemExit(128 + signal.SIGTERM)
            )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _step_seed(seed: int, step: int) -> int:
    # Dropout becomes a pure function of (seed, step): no generator's state needs saving.
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}".encode()).digest()[:8], "little")


def _is_due(step: int, every: int, steps: int) -> bool:
    return (step + 1) % every == 0 or step + 1 == steps


def _worth_a_thread(model: nn.Module) -> bool:
    # Measured with 25 ms of NumPy for a 95 ms step on a CPU: 13 % faster where torch leaves a core
    # free, 4 % slower where it uses all of them; pure Python gains nothing and then loses 10 %.
    return _device(model).type != "cpu" or torch.get_num_threads() < (os.cpu_count() or 1)


def _prepared(
    batches: Batches, first: int, steps: int, *, ahead: bool
) -> Generator[tuple[int, Sequence[Mapping[str, Any]]], None, None]:
    """Each step with its micro-batches; with `ahead` the next step's are made meanwhile."""
    if not ahead:
        yield from ((step, batches(step)) for step in range(first, steps))
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as thread:
        waiting = thread.submit(batches, first) if first < steps else None
        for step in range(first, steps):
            assert waiting is not None
            micro_batches = waiting.result()
            waiting = thread.submit(batches, step + 1) if step + 1 < steps else None
            yield step, micro_batches


def _demand_finite(values: dict[str, float], step: int, run: _Run) -> None:
    if all(map(math.isfinite, values.values())):
        return
    config = run.config
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    arithmetic = ", or precision fp32" if config.precision == "bf16" else ""
    raise RunFailed(
        f"step {step + 1}: the loss or its gradient is not finite ({numbers}). The step was not"
        f" taken; {checkpoint.what_is_kept(run.folder / CHECKPOINTS)}. The same command would end"
        f" here again: try a lower lr (now {config.lr:g}), a longer warm-up (now"
        f" {config.warmup_steps} steps), a smaller clip (now {config.clip:g}){arithmetic}"
    )
