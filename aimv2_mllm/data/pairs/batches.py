"""The batches of a stage as a pure function of the step: which pictures, words and prefixes.

The samples of step s are those from number s * batch_size on, whatever the number of micro-batches,
ranks and workers; so the whole state of the data is the step.

Where sizes vary, a step has batch_size / micro_batch_size mini-batches, and those of step s are
from number s times that on; `Areas` says how many samples each has, and which. Ranks share its
mini-batches, which hold as many patches, and so are about as much work.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NotRequired, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor

from aimv2_mllm.data.drawing import Skipped
from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.order import mixed
from aimv2_mllm.data.pairs.areas import Areas, grid
from aimv2_mllm.data.pairs.corpus import Corpus
from aimv2_mllm.data.pictures.decode import Fit
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.recipe.data import CaptionData, ConversationData
from aimv2_mllm.recipe.stages import PATCH
from aimv2_mllm.recipe.train import TrainConfig

Row = TypeVar("Row")


class CaptionBatch(TypedDict):
    """A `PreTrainingBatch`, or a `MixedSizesBatch` where sizes vary, with what was left out for it,
    where something was."""

    pixel_values: Tensor | list[Tensor]  # (B, 3, H, W), or B of (3, H, W)
    prefix_length: Tensor  # (B,) int64
    caption_ids: Tensor  # (B, T) int64
    caption_length: Tensor  # (B,) int64
    skipped: NotRequired[dict[str, int]]  # rows by reason
    skipped_rows: NotRequired[list[str]]  # some of them, in words


class Share(NamedTuple):
    """Which part of every step this process reads: the `rank`-th of `size` equal ones."""

    rank: int = 0
    size: int = 1

    def of(self, step: int, num_in_step: int) -> tuple[int, int]:
        """The first number of this part of a step of so many samples, and how many it has."""
        assert num_in_step % self.size == 0, (num_in_step, self)
        count = num_in_step // self.size
        return step * num_in_step + self.rank * count, count


EVERYTHING = Share()


def micro_batches(
    config: TrainConfig,
    read: Callable[[Sequence[int]], Sequence[Row]],
    collate: Callable[[Sequence[Row]], Any],
    length: Callable[[Row], int] | None = None,
    *,
    share: Share = EVERYTHING,
) -> Callable[[int], list[Any]]:
    """A function from the step to its micro-batches: `read` from the indices, then collated.

    They hold the `share` of the step's samples, in one piece, and `micro_batch_size` counts in it.
    With `length`, samples of like length share a micro-batch: less padding, and the same loss, for
    that is a sum over the whole step.
    """

    def at(step: int) -> list[Any]:
        first, count = share.of(step, config.batch_size)
        size = config.micro_batch_size or count
        samples = read(range(first, first + count))
        if length is not None:
            samples = sorted(samples, key=length)
        return [collate(samples[i : i + size]) for i in range(0, count, size)]

    return at


def world_seed(run_seed: int, data: CaptionData | ConversationData) -> int:
    """One number for the run's seed and the data's, so that either changes every sheet."""
    return (run_seed << 64) + data.seed


@dataclass(frozen=True)
class CaptionBatches:
    """One rank's pre-training batches by step; it can be sent to another process."""

    corpus: Corpus
    train: TrainConfig
    seed: int
    tokenizer: Any
    preprocessing: Preprocessing
    max_text_tokens: int
    full_prefix: bool = False
    areas: Areas | None = None
    share: Share = EVERYTHING

    def __call__(self, step: int) -> list[CaptionBatch]:
        """The rank's contiguous share of the step's samples, in micro-batches."""
        if self.areas is not None:
            first, count = self.share.of(step, self.train.num_mini_batches)
            return [
                self._batch(range(begin, begin + size), partial(_in_patches, area))
                for area, begin, size in map(self.areas.mini_batch, range(first, first + count))
            ]
        first, count = self.share.of(step, self.train.batch_size)
        size, end = self.train.micro_batch_size or count, first + count
        return [
            self._batch(range(begin, min(begin + size, end))) for begin in range(first, end, size)
        ]

    def _batch(self, numbers: Sequence[int], fit: Fit | None = None) -> CaptionBatch:
        skipped = Skipped()
        samples = [self.corpus.sample(number, skipped, fit) for number in numbers]
        # Pictures (H, W, 3): of one size, or with `fit` of many.
        pictures = [sample.pixels for sample in samples]
        prefixes = [
            self._prefix(number, picture.shape[0] * picture.shape[1] // PATCH**2)
            for number, picture in zip(numbers, pictures, strict=True)
        ]
        captions = [sample.caption for sample in samples]
        ids, length = encode_captions(captions, self.tokenizer, self.max_text_tokens)
        normalise = self.preprocessing.normalise
        batch = CaptionBatch(
            pixel_values=[normalise(picture[None])[0] for picture in pictures]
            if fit
            else normalise(np.stack(pictures)),
            prefix_length=torch.tensor(prefixes),
            caption_ids=ids,
            caption_length=length,
        )
        if skipped.counts:
            batch["skipped"] = dict(skipped.counts)
            batch["skipped_rows"] = skipped.examples
        return batch

    def _prefix(self, number: int, num_patches: int) -> int:
        """How many patches of a sample the encoder may see at once: 1..num_patches - 1, or all."""
        if self.full_prefix:
            return num_patches
        return int(scenes.generator(self.seed, "prefix", number).integers(1, num_patches))


def _in_patches(area: int, width: int, height: int) -> tuple[int, int]:
    """Width and height in pixels of a picture that is to have at most `area` whole patches."""
    rows, columns = grid(height, width, area)
    return columns * PATCH, rows * PATCH


def caption_batches(
    data: CaptionData,
    train: TrainConfig,
    *,
    seed: int,
    tokenizer: Any,
    preprocessing: Preprocessing,
    max_text_tokens: int,
    full_prefix: bool = False,
    areas: tuple[int, int] | None = None,
    share: Share = EVERYTHING,
) -> CaptionBatches:
    """The pre-training batches by step: pictures, captions, and a prefix length of 1 to all but one
    of its patches for each picture, or with `full_prefix` of all.

    Pictures are squares, or with `areas`, the least and the most patches, whole ones of an area
    that is drawn for each micro-batch; this then has as many patches as `micro_batch_size` squares.
    Opens the sources of `data`; UsageError where one cannot be read. A rank gets its contiguous
    `share` of every step.
    """
    world, size = world_seed(seed, data), preprocessing.image_size
    num_patches = (train.micro_batch_size or train.batch_size) * (size // PATCH) ** 2
    return CaptionBatches(
        Corpus(data, world, image_size=size, max_text_tokens=max_text_tokens),
        train,
        world,
        tokenizer,
        preprocessing,
        max_text_tokens,
        full_prefix,
        None if areas is None else Areas(*areas, num_patches, mixed(world, 2)),
        share,
    )


def encode_captions(
    captions: list[str], tokenizer: Any, max_text_tokens: int
) -> tuple[Tensor, Tensor]:
    """Captions as ids (B, T) and lengths (B,), cut at `max_text_tokens` and padded with zeros."""
    # The leading space makes a first word the token that it is elsewhere; a caption that says
    # <|end|> means these letters.
    encoded = tokenizer(
        [f" {text}" for text in captions],
        split_special_tokens=True,
        add_special_tokens=False,  # the end token is the objective's
        verbose=False,
    )
    rows = [ids[:max_text_tokens] for ids in encoded.input_ids]
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, ids in enumerate(rows):
        padded[row, : len(ids)] = ids
    return torch.from_numpy(padded), torch.tensor([len(ids) for ids in rows])


def picture_batch(sheets: Sequence[scenes.Scene], preprocessing: Preprocessing) -> Tensor:
    """The sheets rendered at the encoder's own size and normalised: (B, 3, H, W)."""
    return preprocessing.normalise(
        np.stack([scenes.render(sheet, preprocessing.image_size) for sheet in sheets])
    )
