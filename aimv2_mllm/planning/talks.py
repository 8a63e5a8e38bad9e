"""The conversations of a plan: long ones where none are at hand, and pictures as kept features."""

from collections.abc import Set
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aimv2_mllm.data.talks.batches import TalkBatches
from aimv2_mllm.engine.precision import held_dtype
from aimv2_mllm.model.frozen_tower import FrozenTower
from aimv2_mllm.model.mllm import connector_inputs
from aimv2_mllm.recipe.stages import AlignStage, LanguageStage
from aimv2_mllm.recipe.tune import TuneStage
from aimv2_mllm.stages.job import Job

Batch = dict[str, Any]
AnyTalks = AlignStage | TuneStage | LanguageStage


class Talks(NamedTuple):
    """The batches that a plan counts with, where tokens are counted the one with which memory is
    measured, and what is to be noted of them."""

    batches: list[Batch]
    fullest: Batch | None
    notes: list[str]


def talks_of(
    name: str, stage: AnyTalks, job: Job, batches: list[Batch], *, wrong: Set[str], half: bool
) -> Talks:
    """The `batches` of the stage `name` as training has them.

    `wrong` are the keys of the recipe that have a problem; `half`: the device has bfloat16.
    """
    assert isinstance(job.batches, TalkBatches), job.batches
    notes, most = [], job.batches.corpus.max_tokens
    budget = stage.train.micro_batch_tokens
    num_sources = len(stage.data.sources)
    missing = sum(f"stages.{name}.data.sources.{n}" in wrong for n in range(num_sources))
    if missing == num_sources:
        size = len(batches[0]["lengths"]) if budget is None else max(budget // most, 1)
        batches = [as_long(batches[0], size, most)]
        notes.append(f"no conversations at hand: all are counted with {most:,} tokens")
    elif missing:
        notes.append(f"{missing} of {num_sources} sources not at hand: counted as the others")
    fullest = None
    if budget is not None:
        fullest = filled(batches, budget, job.batches)
        tokens = fullest["input_ids"].shape[1]
        more = "" if tokens == budget else ", which the longest conversation alone may have"
        notes.append(f"memory is that of a micro-batch of {tokens:,} tokens{more}")
    if job.prepare is not None:
        dtype, every = held_dtype(stage.train, half), [*batches, *([fullest] if fullest else [])]
        kept = with_features(job, every, dtype)
        batches, fullest = kept[: len(batches)], kept[-1] if fullest else None
        notes.append("features of all pictures are counted as kept")
    return Talks(batches, fullest, notes)


def filled(batches: list[Batch], budget: int, made_by: TalkBatches) -> Batch:
    """A packed batch of exactly `budget` tokens, or as many as the longest conversation alone can
    have: those of `batches` over and over, whole, and the last with words that are supervised."""
    writer = made_by.writer
    blank = len(writer.blank().ids)
    budget = max(budget, made_by.corpus.max_tokens + blank)
    talks = [
        piece
        for batch in batches
        for piece in zip(
            *(batch[key][0].split(batch["lengths"].tolist()) for key in ("input_ids", "labels")),
            strict=True,
        )
    ]
    chosen, tokens = list[tuple[Tensor, Tensor]](), 0
    for ids, labels in cycle(talks):
        if chosen and tokens + len(ids) > budget:
            break
        chosen.append((ids, labels))
        tokens += len(ids)
    chosen.sort(key=lambda talk: len(talk[0]))
    more = chosen[-1][0][-1:].expand(max(budget - tokens, 0))
    chosen[-1] = (torch.cat([chosen[-1][0], more]), torch.cat([chosen[-1][1], more]))
    lengths = [len(ids) for ids, _ in chosen]
    full = {
        "lengths": torch.tensor(lengths),
        "input_ids": torch.cat([ids for ids, _ in chosen])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "labels": torch.cat([labels for _, labels in chosen])[None],
    }
    if "pixel_values" in batches[0]:
        count = int((full["input_ids"] == writer.image_token_id).sum()) // blank
        shape = batches[0]["pixel_values"].shape[1:]
        full["pixel_values"] = torch.empty(count, *shape, device="meta")
    return full


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
    pictures = [batch.pop("pixel_values") for batch in batches]
    with torch.no_grad(), connector_inputs(body) as given:
        body.get_image_features(torch.empty(1, *pictures[0].shape[1:], device="meta"))
    FrozenTower(body, dtype)
    return [
        {
            **batch,
            "features": torch.empty(len(some), *given[0].shape[1:], dtype=dtype, device="meta"),
            "is_cached": torch.ones(len(some), dtype=torch.bool),
        }
        for batch, some in zip(batches, pictures, strict=True)
    ]
