"""The conversations of a plan: long ones where none are at hand, and pictures as kept features."""

from collections.abc import Set
from typing import Any

import torch

from aimv2_mllm.data.talk_batches import TalkBatches
from aimv2_mllm.engine.precision import held_dtype
from aimv2_mllm.job import Job
from aimv2_mllm.model.frozen_tower import FrozenTower
from aimv2_mllm.recipe_stages import AlignStage, LanguageStage
from aimv2_mllm.recipe_tune import TuneStage

Batch = dict[str, Any]
AnyTalks = AlignStage | TuneStage | LanguageStage


def talks_of(
    name: str, stage: AnyTalks, job: Job, batches: list[Batch], *, wrong: Set[str], half: bool
) -> tuple[list[Batch], list[str]]:
    """The `batches` of the stage `name` as training has them, and what is to be noted of them.

    `wrong` are the keys of the recipe that have a problem; `half`: the device has bfloat16.
    """
    notes = []
    num_sources = len(stage.data.sources)
    missing = sum(f"stages.{name}.data.sources.{n}" in wrong for n in range(num_sources))
    if missing == num_sources:
        assert isinstance(job.batches, TalkBatches), job.batches
        most, size = job.batches.corpus.max_tokens, len(batches[0]["lengths"])
        batches = [as_long(batches[0], size, most)]
        notes.append(f"no conversations at hand: all are counted with {most:,} tokens")
    elif missing:
        notes.append(f"{missing} of {num_sources} sources not at hand: counted as the others")
    if job.prepare is not None:
        batches = with_features(job, batches, held_dtype(stage.train, half))
        notes.append("features of all pictures are counted as kept")
    return batches, notes


def as_long(batch: Batch, size: int, most: int) -> Batch:
    """`size` conversations of `most` tokens, made of the first one of a packed `batch` and its
    picture: what is added is supervised, so that nothing that fits max_tokens takes more."""
    first = int(batch["lengths"][0])
    word = batch["input_ids"][:, first - 1 : first]
    more = word.expand(1, max(most - first, 0))
    length = first + more.shape[1]
    ids = torch.cat([batch["input_ids"][:, :first], more], 1)  # (1, length)
    labels = torch.cat([batch["labels"][:, :first], more], 1)
    long = {
        "lengths": torch.full((size,), length),
        "input_ids": ids.repeat(1, size),
        "position_ids": torch.arange(length).repeat(1, size),
        "labels": labels.repeat(1, size),
    }
    if "pixel_values" in batch:
        shape = batch["pixel_values"].shape[1:]
        long["pixel_values"] = torch.empty(size, *shape, device="meta")
    return long


def with_features(job: Job, batches: list[Batch], dtype: torch.dtype) -> list[Batch]:
    """`batches` with features of the `dtype` for pictures, and the tower out of the model of `job`,
    as in training with `data.features` when all of them fit."""
    body: Any = next(m for m in job.model.modules() if hasattr(m, "multi_modal_projector"))
    shapes: list[torch.Size] = []  # (1, N, D)
    hook = body.multi_modal_projector.register_forward_pre_hook(
        lambda _, given: shapes.append(given[0].shape)
    )
    pictures = [batch.pop("pixel_values") for batch in batches]
    with torch.no_grad():
        body.get_image_features(torch.empty(1, *pictures[0].shape[1:], device="meta"))
    hook.remove()
    FrozenTower(body, dtype)
    return [
        {
            **batch,
            "features": torch.empty(len(some), *shapes[0][1:], dtype=dtype, device="meta"),
            "is_cached": torch.ones(len(some), dtype=torch.bool),
        }
        for batch, some in zip(batches, pictures, strict=True)
    ]
