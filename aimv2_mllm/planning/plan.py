"""What a recipe would do, without doing it: sizes, memory, operations and hours of every stage.

Each stage is built as for training, with shapes alone, and its first micro-batches are rehearsed on
the meta device; so a plan follows whatever the models are. Results of earlier stages are stood in
for by their configs, corpora that are not there by the longest captions.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from aimv2_mllm.data.talks.batches import TalkBatches
from aimv2_mllm.engine.accelerators import Accelerator
from aimv2_mllm.engine.precision import held_dtype
from aimv2_mllm.engine.rehearsal import Footprint, rehearse
from aimv2_mllm.engine.strategies import blocks
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.model.answering import CHUNKS, Answering
from aimv2_mllm.model.quantising import is_quantised, num_bytes, num_weights
from aimv2_mllm.place import Place
from aimv2_mllm.planning.planned import Beside, Memory, Plan, SourceUse, StagePlan
from aimv2_mllm.planning.problems import Problem, find_problems
from aimv2_mllm.planning.processes import beside
from aimv2_mllm.planning.stand_ins import WORDS, grown, longest_caption, sketched
from aimv2_mllm.planning.talks import talks_of
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.recipe.stages import LitStage, PretrainStage, Stage, references
from aimv2_mllm.stages.job import Job, is_loaded_once
from aimv2_mllm.stages.table import opened


def plan(recipe: Recipe, device: Accelerator, num_devices: int) -> Plan:
    """The plan of `recipe` on `num_devices` of that kind; nothing is trained, loaded or written."""
    problems = find_problems(Place(recipe, recipe.output), num_devices)
    wrong = {problem.key for problem in problems}
    stages: list[StagePlan] = []
    with TemporaryDirectory() as folder:
        sketch = Place(recipe, Path(folder), has_bf16=device.has_bf16)
        for name, stage in recipe.stages.items():
            outline, is_missing = _outlined(name, stage, wrong, num_devices)
            planned, unbuilt = outline, ""
            if not _follows_on(stage, stages):
                planned, unbuilt = _planned(outline, is_missing, sketch, wrong, device, num_devices)
            stages.append(planned)
            known = any(f"{key}.".startswith(f"stages.{name}.") for key in wrong)
            if unbuilt and not known:
                problems.append(Problem(f"stages.{name}", unbuilt))
    return Plan(stages, problems)


def _follows_on(stage: Stage, planned: Sequence[StagePlan]) -> bool:
    """Whether `stage` starts from another that could not be planned."""
    unknown = {other.name for other in planned if other.memory is None}
    # What a pretrain stage starts from lends it weights, and no sizes.
    return any(
        name in unknown for key, name in references(stage).items() if not key.startswith("start.")
    )


def _outlined(name: str, stage: Stage, wrong: set[str], num_devices: int) -> tuple[StagePlan, bool]:
    """What of the stage's plan needs no model, and whether samples of it are not there."""
    count = max(stage.train.batch_size // num_devices, 1)
    micro = min(stage.train.micro_batch_size or count, count)
    sources, is_missing = _sources(f"stages.{name}", stage, wrong)
    whole = 0 if stage.train.micro_batch_tokens else math.ceil(count / micro)
    return StagePlan(name, stage.kind, stage.train, micro, whole, sources), is_missing


def _planned(
    outline: StagePlan,
    is_missing: bool,
    sketch: Place,
    wrong: set[str],
    device: Accelerator,
    num_devices: int,
) -> tuple[StagePlan, str]:
    """The whole of an outlined plan, and why the stage could not be built, if so."""
    name, micro = outline.name, outline.micro_batch
    stage = sketch.recipe.stages[name]
    if getattr(stage.data, "image_aspect", "") == "native":  # as many patches as any may have
        squares: Any = stage.data.model_copy(update={"image_aspect": "pad"})
        stage = stage.model_copy(update={"data": squares})
    try:
        job = sketched(name, stage, sketch, wrong=wrong, micro=micro)
        batches = job.batches(0)
    except (UsageError, RunFailed) as error:
        return outline, str(error)
    longest = longest_caption(stage) if is_missing else None
    by_tokens = stage.train.micro_batch_tokens
    full = [grown(dict(batch), 1 if by_tokens else micro, longest) for batch in batches]
    fullest: dict[str, Any] | None = None
    number = outline.num_micro_batches
    notes: list[str] = []
    if longest:
        notes.append(f"no captions at hand: all are counted with {longest} tokens")
    if f"stages.{name}.tokenizer" in wrong:
        notes.append(f"no tokenizer at hand: counted with {WORDS.get(stage.kind, 0):,} words")
    table, held = job.table(), held_dtype(stage.train, device.has_bf16)
    loaded = sum(
        num_weights(p) * held.itemsize if is_quantised(p) else p.nbytes
        for p in job.model.parameters()
    )
    trained = sum(p.nbytes for named in job.parts.values() for _, p in named)
    if isinstance(job.batches, TalkBatches):
        assert not isinstance(stage, PretrainStage | LitStage), stage
        full, fullest, more = talks_of(name, stage, job, full, wrong=wrong, half=device.has_bf16)
        notes += more
    if by_tokens:
        number = math.ceil(micro * len(full) / sum(len(batch["lengths"]) for batch in full))
    num_loading = 1 if is_loaded_once(stage, num_devices) else num_devices
    outline = replace(outline, num_micro_batches=number, loaded=loaded, num_loading=num_loading)
    memory, flops, fullest = _cost(job, outline, full, fullest, device, num_devices)
    return replace(
        outline,
        table=table,
        shapes={k: _shape(v) for k, v in fullest.items() if _shape(v)},
        memory=memory,
        flops=flops,
        checkpoint=3 * trained,
        notes=notes,
    ), ""


def _sources(here: str, stage: Stage, wrong: set[str]) -> tuple[list[SourceUse], bool]:
    """The stage's sources, and whether one with captions is not there."""
    listed = stage.data.sources
    weights, found, is_missing = sum(source.weight for source in listed), [], False
    for number, source in enumerate(listed):
        rows = None
        if f"{here}.data.sources.{number}" in wrong:
            is_missing = True
        else:
            groups = getattr(opened(stage, number), "groups", None)  # the world has none, or no end
            rows = sum(groups) if groups else None
        drawn = stage.train.steps * stage.train.batch_size * source.weight / weights
        found.append(SourceUse(source.kind, rows, drawn / rows if rows else None))
    return found, is_missing


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return (len(value), *value[0].shape) if isinstance(value, list) else ()


def _cost(
    job: Job,
    outline: StagePlan,
    batches: Sequence[dict[str, Any]],
    fullest: dict[str, Any] | None,
    device: Accelerator,
    num_devices: int,
) -> tuple[Memory, float, dict[str, Any]]:
    """Memory of the `fullest` micro-batch (None: of those that are planned with the one that takes
    most), operations of a mean sample of `batches`, and that micro-batch."""
    train = outline.train
    half = train.precision == "bf16" and device.has_bf16
    is_sharded = num_devices > 1 and train.strategy == "fsdp2"
    model = job.model.train()
    if device.is_shared and isinstance(model, Answering):
        model.chunk = CHUNKS["cpu"]
    weights = sum(num_bytes(p) for p in model.parameters())
    kept = sum(num_bytes(p) for p in model.parameters() if is_quantised(p))  # whole everywhere
    trained = sum(p.nbytes for named in job.parts.values() for _, p in named)
    gathered = _gathered(model, 2 if half else 4) if is_sharded else 0
    if is_sharded and half:
        model = model.to(torch.bfloat16)
    words = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]

    def rehearsed(batch: dict[str, Any], *, checkpointing: bool) -> Footprint:
        return rehearse(
            model,
            job.objective,
            batch,
            half=half and not is_sharded,
            checkpointing=checkpointing,
            words=max(words, default=0),
            gradients_before=num_devices > 1 or outline.num_micro_batches > 1,
        )

    planned = [*batches, fullest] if fullest else batches
    prints = [rehearsed(one, checkpointing=train.activation_checkpointing) for one in planned]
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    flops = sum(footprint.flops for footprint in prints[: len(batches)]) / samples
    most = prints[-1] if fullest else max(prints, key=lambda one: one.activations + one.gradients)
    chosen, more = planned[prints.index(most)], Beside()
    if device.is_shared:
        small = rehearsed(chosen, checkpointing=False).small
        more = beside(job, outline, chosen, small, outline.loaded - weights)
    sizes = (weights, most.gradients, 2 * trained, most.activations)
    if is_sharded:
        share = num_devices
        weights = kept + (weights - kept) // share
        sizes = (weights, trained // share, 2 * trained // share, most.activations + gathered)
    return Memory(*sizes, most.logits, more), flops, chosen


def _gathered(model: nn.Module, width: int) -> int:
    """The bytes that FSDP2 holds whole at once, of what is in no block and of two blocks: weights
    as they are multiplied, in `width` bytes, and gradients of the trained as they are added."""

    def size(part: nn.Module) -> int:
        sharded = (p for p in part.parameters() if not is_quantised(p))
        return sum(p.numel() * (width + 4 * p.requires_grad) for p in sharded)

    sizes = sorted(size(block) for block in blocks(model))
    return size(model) - sum(sizes) + sum(sizes[-2:])
