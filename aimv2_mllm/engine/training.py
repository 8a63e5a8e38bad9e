"""One stage in training: what a step changes, how its gradients come about, its way to disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_leaves

from aimv2_mllm import heap
from aimv2_mllm.disk import sync
from aimv2_mllm.engine import checkpoint, metrics
from aimv2_mllm.engine.distributed import Ranks
from aimv2_mllm.engine.flops import FlopCounter
from aimv2_mllm.engine.optimizer import Parts, build_optimizer, restore, training_tensors
from aimv2_mllm.engine.precision import autocast
from aimv2_mllm.engine.strategies import give_back, place, whole
from aimv2_mllm.errors import UsageError

if TYPE_CHECKING:
    from aimv2_mllm.recipe.train import TrainConfig

CHECKPOINTS = "checkpoints"
COUNTED_EVERY = 10  # steps with packed conversations


class Loss(Protocol):
    """A NamedTuple of scalars: `total` is what is minimised, the others are its parts by name."""

    @property
    def total(self) -> Tensor: ...

    def _asdict(self) -> dict[str, Tensor]: ...


class Objective(Protocol):
    """What stands between model and loop."""

    def targets(self, batch: Any) -> dict[str, int]:
        """How many targets `batch` has, by kind; the kinds are the same for every batch."""

    def __call__(self, model: nn.Module, batch: Any, totals: dict[str, int]) -> Loss:
        """The batch's sums over the whole step's `totals`, so that micro-batches add up."""


@dataclass(frozen=True)
class Run:
    """What a stage is trained under: its settings, its folder, whose checkpoints it may take."""

    config: TrainConfig
    folder: Path
    fingerprint: str
    ranks: Ranks


class Training:
    """`parts` of `model`, placed for training, with their optimiser."""

    def __init__(self, model: nn.Module, parts: Parts, run: Run) -> None:
        _check(model, parts)
        self._model, self._run = model, run
        self._placed = place(model, run.config, run.ranks)
        # What is sharded has parameters of its own, under the same names.
        own = dict(self._placed.module.named_parameters())
        self._parts = {
            part: [(name, own[name]) for name, _ in named] for part, named in parts.items()
        }
        self.optimizer = build_optimizer(self._parts, run.config)
        self.device = self._placed.device
        self._flops_rate: float | None = None
        self._most = 0  # bytes of the largest micro-batch so far

    def resume(self, narrate: Callable[[str], None]) -> metrics.Progress:
        """How far the newest whole checkpoint is, restored; the metrics are cut back to it."""
        run = self._run
        found = checkpoint.load_newest(
            run.folder / CHECKPOINTS, run.fingerprint, narrate, ranks=run.ranks
        )
        progress = metrics.Progress()
        if found is not None:
            step, stored, state = found
            if step > run.config.steps:
                raise UsageError(
                    f"{run.folder} is at step {step} already, beyond steps = {run.config.steps}"
                )
            restore(self._placed.module, self._parts, self.optimizer, stored)
            progress = metrics.Progress.from_json(state["progress"])
            self._flops_rate = state.get("flops_rate")
            narrate(f"continuing from step {step}")
        run.ranks.first(lambda: metrics.cut_back(run.folder / metrics.METRICS_FILE, progress.step))
        return progress

    def save(self, progress: metrics.Progress) -> None:
        """Write a checkpoint; the metrics reach the disk before it does."""
        run = self._run
        lines = run.folder / metrics.METRICS_FILE
        if run.ranks.is_first and lines.exists():
            sync(lines)
        state = {
            "fingerprint": run.fingerprint,
            "progress": progress.to_json(),
            "flops_rate": self._flops_rate,
        }
        checkpoint.save(
            run.folder / CHECKPOINTS,
            progress.step,
            self._tensors(),
            state,
            keep=run.config.keep_checkpoints,
            ranks=run.ranks,
        )

    def give_back(self) -> None:
        """Bring what was trained into the model that was given, on the CPU; under fsdp2 on rank 0,
        and the others are left with shapes."""
        give_back(self._placed, self._model, self._run.ranks)

    def gradients(
        self, objective: Objective, micro_batches: Sequence[Mapping[str, Any]], step: int
    ) -> metrics.Step:
        """Leave the clipped gradients of step number `step` in the model, and tell what they were
        made of."""
        batches = [dict(batch) for batch in micro_batches]
        totals, skipped, samples, work = self._totals(objective, batches)
        sums: dict[str, Tensor] = {}
        self.optimizer.zero_grad()
        counts = self._flops_rate is None or self._counts_anew(batches[0], step)
        counter = FlopCounter() if counts else None
        with torch.compiler.set_stance("default" if counter is None else "force_eager"):
            for number, batch in enumerate(batches, 1):
                held = self._placed.hold_back() if number < len(batches) else nullcontext()
                with held:
                    loss = self._loss(objective, batch, totals, counter)
                    torch.autograd.backward(loss.total)
                for name, value in loss._asdict().items():
                    sums[name] = sums.get(name, 0) + value.detach().float()
        if counter is not None:
            self._flops_rate = counter.flops / sum(map(_work, batches))
        flops = (self._flops_rate or 0.0) * work
        values = self._added_and_clipped(sums)
        return metrics.Step(values, totals, skipped, samples, flops)

    def _counts_anew(self, batch: Mapping[str, Any], step: int) -> bool:
        """Whether the operations of a step with batches like `batch` are counted, or taken to be
        those of the last that were, by its work: counting takes a tenth of a small model's time."""
        if self._run.config.compile:  # into which a counter cannot see
            return False
        # Pictures, each of its size, and those whose features are kept beside others.
        if any(isinstance(v, list) or name == "is_cached" for name, v in batch.items()):
            return True
        # Those of a token differ by a few per cent.
        return "lengths" in batch and step % COUNTED_EVERY == 0

    def _totals(
        self, objective: Objective, batches: list[dict[str, Any]]
    ) -> tuple[dict[str, int], dict[str, int], int, int]:
        """The step's targets by kind, what was skipped by reason, samples, and `_work`, over all
        ranks."""
        assert batches, "a step without a batch"
        skipped, totals, samples, work = dict[str, int](), dict[str, int](), 0, 0
        for batch in batches:
            metrics.add_to(skipped, batch.pop("skipped", {}))
            metrics.add_to(totals, objective.targets(batch))
            samples += len(batch["lengths"]) if "lengths" in batch else _work(batch)
            work += _work(batch)
        ranks = self._run.ranks
        kinds = sorted(totals)
        own = [samples, work, len(batches), sum(skipped.values())]
        *counts, samples, work, num_batches, num_skipped = ranks.add_up(
            [*(totals[kind] for kind in kinds), *own]
        )
        assert num_batches == len(batches) * ranks.size, "ranks differ in their micro-batches"
        if num_skipped:
            every, skipped = ranks.gather(skipped), {}
            for one in every:
                metrics.add_to(skipped, one)
        return {kind: counts[kinds.index(kind)] for kind in totals}, skipped, samples, work

    def _loss(
        self,
        objective: Objective,
        batch: dict[str, Any],
        totals: dict[str, int],
        counter: FlopCounter | None,
    ) -> Loss:
        device, placed = self.device, self._placed
        size = sum(value.nbytes for value in tree_leaves(batch) if isinstance(value, Tensor))
        if size > self._most:
            self._most = size
            heap.give_back()
        on_device = {name: _moved(value, device) for name, value in batch.items()}
        with autocast(device, placed.precision), counter or nullcontext():
            return objective(placed.call, on_device, totals)

    def _added_and_clipped(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """The loss parts over all ranks, and the norm of the gradient before it was clipped."""
        parts = torch.stack(list(sums.values()))
        if self._run.ranks.size > 1:
            dist.all_reduce(parts)
        trained = [parameter for named in self._parts.values() for _, parameter in named]
        norm = whole(clip_grad_norm_(trained, self._run.config.clip)).float()
        # One transfer for all of them: each would stop an accelerator.
        values = torch.cat([parts, norm[None]]).tolist()
        return dict(zip([*sums, "grad_norm"], values, strict=True))

    def _tensors(self) -> dict[str, Tensor]:
        return training_tensors(self._placed.module, self._parts, self.optimizer)


def _check(model: nn.Module, parts: Parts) -> None:
    everywhere = dict(model.named_parameters())
    given = {name: parameter for named in parts.values() for name, parameter in named}
    strange = [name for name, parameter in given.items() if everywhere.get(name) is not parameter]
    assert not strange, f"not the model's parameters of these names: {strange[:5]}"
    trainable = {name for name, parameter in everywhere.items() if parameter.requires_grad}
    odd = sorted(trainable ^ set(given))
    assert not odd, f"trainable and in no part, or in a part and frozen: {odd[:5]}"


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):  # pictures of different sizes
        return [_moved(one, device) for one in value]
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _work(batch: Mapping[str, Any]) -> int:
    """What the work of a batch goes by: tokens where conversations are packed, else samples."""
    if "lengths" in batch:
        return int(batch["lengths"].sum())
    return len(next(iter(batch.values())))
