"""The batches of a stage as a pure function of the step: which sheets, which words, which prefixes.

Sample j of step s is the world's sample s * batch_size + j, whatever the number of micro-batches;
so the whole state of the data is the step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from aimv2_mllm.data import scenes
from aimv2_mllm.data.conversations import conversation, tokenize
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.objective import ConversationBatch, PreTrainingBatch
from aimv2_mllm.recipe import CaptionData, ConversationData, TrainConfig


def micro_batches(
    config: TrainConfig, collate: Callable[[Sequence[int]], Any]
) -> Callable[[int], list[Any]]:
    """A function from the step to its micro-batches, each collated from the indices of its
    samples."""
    size = config.micro_batch_size or config.batch_size

    def at(step: int) -> list[Any]:
        first = step * config.batch_size
        indices = range(first, first + config.batch_size)
        return [collate(indices[i : i + size]) for i in range(0, config.batch_size, size)]

    return at


def world_seed(run_seed: int, data: CaptionData) -> int:
    """One number for the run's seed and the data's, so that either changes every sheet."""
    return (run_seed << 64) + data.seed


def caption_batches(
    data: CaptionData,
    train: TrainConfig,
    *,
    seed: int,
    tokenizer: Any,
    preprocessing: Preprocessing,
    num_patches: int,
    max_text_tokens: int,
) -> Callable[[int], list[PreTrainingBatch]]:
    """The pre-training batches by step: sheets, captions, and a prefix length of 1..num_patches-1
    for each sheet."""
    world = world_seed(seed, data)

    def collate(indices: Sequence[int]) -> PreTrainingBatch:
        sheets = [scenes.scene(world, "train", index) for index in indices]
        lengths = [
            int(scenes.generator(world, "prefix", i).integers(1, num_patches)) for i in indices
        ]
        captions = [scenes.caption(sheet) for sheet in sheets]
        ids, length = encode_captions(captions, tokenizer, max_text_tokens)
        return PreTrainingBatch(
            pixel_values=picture_batch(sheets, preprocessing),
            prefix_length=torch.tensor(lengths),
            caption_ids=ids,
            caption_length=length,
        )

    return micro_batches(train, collate)


def encode_captions(
    captions: list[str], tokenizer: Any, max_text_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions as ids (B, T) and lengths (B,), cut at `max_text_tokens` and padded with zeros."""
    # The leading space makes a first word the token that it is elsewhere.
    rows = [ids[:max_text_tokens] for ids in tokenizer([f" {text}" for text in captions]).input_ids]
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = ids
    return torch.from_numpy(padded), torch.tensor([len(ids) for ids in rows])


def conversation_batches(
    data: ConversationData,
    train: TrainConfig,
    *,
    seed: int,
    tokenizer: Any,
    preprocessing: Preprocessing | None,
    num_image_tokens: int = 0,
) -> Callable[[int], list[ConversationBatch]]:
    """The conversation batches by step: about pictures, or, without `preprocessing`, about sheets
    described in words."""
    world, seen = world_seed(seed, data), preprocessing is not None

    def collate(indices: Sequence[int]) -> ConversationBatch:
        sheets = [scenes.scene(world, "train", index) for index in indices]
        talks = [
            conversation(
                sheet,
                scenes.generator(world, "talk", index),
                tasks={str(task): weight for task, weight in data.tasks.items()},
                turns=data.turns,
                seen=seen,
            )
            for sheet, index in zip(sheets, indices, strict=True)
        ]
        batch = tokenize(tokenizer, talks, num_image_tokens=num_image_tokens)
        if preprocessing is not None:
            batch["pixel_values"] = picture_batch(sheets, preprocessing)
        if not (batch["labels"] >= 0).any():
            raise UsageError(
                "no token is supervised: the tokenizer's chat template marks no assistant text"
            )
        return batch

    return micro_batches(train, collate)


def picture_batch(sheets: Sequence[scenes.Scene], preprocessing: Preprocessing) -> torch.Tensor:
    """The sheets rendered at the encoder's own size and normalised: (B, 3, H, W)."""
    return preprocessing.normalise(
        np.stack([scenes.render(sheet, preprocessing.image_size) for sheet in sheets])
    )
