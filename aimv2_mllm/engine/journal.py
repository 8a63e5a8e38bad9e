"""What a run tells while it trains: lines in `metrics.jsonl` and to trackers, and its progress."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing

import torch

from aimv2_mllm.engine.flops import peak
from aimv2_mllm.engine.metrics import METRICS_FILE, Progress, ProgressBar, Step, append_line
from aimv2_mllm.engine.trackers import tracked
from aimv2_mllm.engine.training import Run


class Journal:
    """While entered, writes down finished steps; on ranks other than 0 it only counts them."""

    def __init__(self, run: Run, progress: Progress, device: torch.device) -> None:
        self._run, self._progress, self._device = run, progress, device
        self._open = ExitStack()

    def __enter__(self) -> Journal:
        if self._run.ranks.is_first:
            config, folder = self._run.config, self._run.folder
            settings = config.model_dump(mode="json")
            bar = ProgressBar(config.steps, self._progress.step, unit="step")
            self._bar = self._open.enter_context(closing(bar))
            self._samples_before = self._progress.samples
            self._trackers = self._open.enter_context(tracked(config.trackers, folder, settings))
        # Before the first step: what has to be measured would be timed as a part of one.
        self._peak = peak(self._device, self._run.config.precision) * self._run.ranks.size
        self._mark = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def note(self, step: Step, rates: dict[str, float]) -> None:
        """Count a step that has just been taken, at the learning `rates` of the parts."""
        progress, config, ranks = self._progress, self._run.config, self._run.ranks
        now = time.perf_counter()
        step.seconds, self._mark = now - self._mark, now
        progress.add(step)
        if ranks.is_first:
            rate = (progress.samples - self._samples_before) / self._bar.seconds
            loss, lr = step.values["total"], max(rates.values())
            text = f"loss {loss:.4f}, lr {lr:.2e}, {rate:.1f} samples/s"
            self._bar.show(progress.step, text)
        if is_due(progress.step, config.log_every, config.steps):
            line = progress.close_line(rates, self._peak, self._device)
            if ranks.is_first:
                append_line(self._run.folder / METRICS_FILE, line)
                self._trackers.log(line)


def is_due(done: int, every: int, steps: int) -> bool:
    """Whether after `done` of `steps` steps it is time for what comes `every` so many, or last."""
    return done % every == 0 or done == steps
