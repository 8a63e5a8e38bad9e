"""The training loop: one page for every stage, exact across interruptions.

Owns the order of a step and what happens when a run is stopped; refuses to know which stage, model
or loss it trains.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aimv2_mllm import heap
from aimv2_mllm.engine.checkpoint import what_is_kept
from aimv2_mllm.engine.distributed import ALONE, Ranks
from aimv2_mllm.engine.journal import Journal, is_due
from aimv2_mllm.engine.optimizer import Parts, set_learning_rates
from aimv2_mllm.engine.precision import has_bf16
from aimv2_mllm.engine.skipping import Skipping
from aimv2_mllm.engine.stopping import StopRequest
from aimv2_mllm.engine.training import CHECKPOINTS, Objective, Run, Training
from aimv2_mllm.engine.upcoming import Batches, upcoming_steps
from aimv2_mllm.errors import RunFailed

if TYPE_CHECKING:
    from aimv2_mllm.recipe.train import TrainConfig

GO_ON = "the same command goes on from there"


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
    ranks: Ranks = ALONE,
    workers: int = 0,
    max_skipped: float = 1.0,
) -> dict[str, Any]:
    """Train `parts` of `model` in place, from the newest checkpoint in `folder` on.

    Gives steps, samples, seconds and last, the last line of `metrics.jsonl`. `batches(step)`,
    0-based, is this rank's micro-batches of the step, as many on every rank: a pure function of the
    step with generators of its own, for it may run in another thread, or in one of `workers`
    processes. A micro-batch may say in `skipped` how many rows were left out for it, by reason:
    more than a share of `max_skipped` ends the run.

    Interrupted anywhere and started again, the weights and the metrics (`metrics.TIMED_FIELDS`
    aside) are those of an uninterrupted run: bit for bit on as many ranks under the same strategy
    (of more than two as far as the communication library adds in the same order), and within
    rounding otherwise, also with other micro-batches, activation checkpointing or compilation.

    Raises `RunFailed` (loss not finite, disk full, too many rows left out), `UsageError` (another
    run's checkpoint, unknown part, no such device), and on all ranks, after a signal to any and a
    saved checkpoint, `KeyboardInterrupt` (SIGINT) or `SystemExit(143)` (SIGTERM).
    """
    run = Run(config, folder, fingerprint, ranks)
    with StopRequest(ranks) as stop:
        training = Training(model.train(), parts, run)
        progress = training.resume(narrate)
        skipping, device, first = Skipping(max_skipped), training.device, progress.step
        _tell_emulation(config, device, narrate)
        upcoming = upcoming_steps(batches, first, config.steps, device=device, workers=workers)
        with closing(upcoming), Journal(run, progress, device) as journal:
            for step, made in upcoming:
                micro_batches = skipping.take_names(made)
                torch.manual_seed(_step_seed(seed, step, ranks.rank))
                rates = set_learning_rates(training.optimizer, step, config)
                done = training.gradients(objective, micro_batches, step)
                _demand_finite(done.values, step, run)
                training.optimizer.step()
                journal.note(done, rates)
                skipping.check(progress.samples, progress.skipped)
                stopping = stop.agreed()
                if stopping or is_due(progress.step, config.checkpoint_every, config.steps):
                    training.save(progress)
                if stopping:
                    narrate(f"stopped after step {progress.step}; {GO_ON}")
                    break
        training.give_back()
    del training
    heap.give_back()  # what is saved needs it in other pieces
    return progress.summary()


def _tell_emulation(
    config: TrainConfig, device: torch.device, narrate: Callable[[str], None]
) -> None:
    if config.precision == "bf16" and not has_bf16(device):
        narrate("precision bf16: this processor would emulate it, so fp32 is computed")


def _step_seed(seed: int, step: int, rank: int) -> int:
    # Dropout becomes a pure function of (seed, step, rank): no generator's state needs saving.
    text = f"{seed}:{step}:{rank}" if rank else f"{seed}:{step}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _demand_finite(values: dict[str, float], step: int, run: Run) -> None:
    if all(map(math.isfinite, values.values())):
        return
    config = run.config
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
    arithmetic = ", or precision fp32" if config.precision == "bf16" else ""
    raise RunFailed(
        f"step {step + 1}: the loss or its gradient is not finite ({numbers}). The step was not"
        f" taken; {what_is_kept(run.folder / CHECKPOINTS)}. The same command would end"
        f" here again: try a lower lr (now {config.lr:g}), a longer warm-up (now"
        f" {config.warmup_steps} steps), a smaller clip (now {config.clip:g}){arithmetic}"
    )
