"""The batches of a stage as a pure function of the step: which pictures, words and prefixes.

The samples of step s are those from number s * batch_size on, whatever the number of micro-batches,
ranks and workers; so the whole state of the data is the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from aimv2_mllm.data import scenes
from aimv2_mllm.data.corpus import Corpus
from aimv2_mllm.data.drawing import Skipped
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.objective import PreTrainingBatch
from aimv2_mllm.recipe_data import CaptionData, ConversationData
from aimv2_mllm.recipe_train import TrainConfig

Sample = TypeVar("Sample")


class CaptionBatch(PreTrainingBatch, total=False):
    """A pre-training batch with what was left out for it, where something was."""

    skipped: dict[str, int]  # rows by reason
    skipped_rows: list[str]  # some of them, in words


class Share(NamedTuple):
    """Which part of every step's samples this process reads: the `rank`-th of `size` equal ones."""

    rank: int = 0
    size: int = 1

    def of(self, step: int, train: TrainConfig) -> tuple[int, int]:
        """The first sample of this part of a step, and how many it has."""
        assert train.batch_size % self.size == 0, (train.batch_size, self)
        count = train.batch_size // self.size
        return step * train.batch_size + self.rank * count, count


EVERYTHING = Share()


def micro_batches(
    config: TrainConfig,
    read: Callable[[Sequence[int]], Sequence[Sample]],
    collate: Callable[[Sequence[Sample]], Any],
    length: Callable[[Sample], int] | None = None,
    *,
    share: Share = EVERYTHING,
) -> Callable[[int], list[Any]]:
    """A function from the step to its micro-batches: `read` from the indices, then collated.

    They hold the `share` of the step's samples, in one piece, and `micro_batch_size` counts in it.
    With `length`, samples of like length share a micro-batch: less padding, and the same loss, for
    that is a sum over the whole step.
    """

    def at(step: int) -> list[Any]:
        first, count = share.of(step, config)
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
    num_patches: int
    max_text_tokens: int
    full_prefix: bool = False
    share: Share = EVERYTHING

    def __call__(self, step: int) -> list[CaptionBatch]:
        """The rank's contiguous share of the step's samples, in micro-batches."""
        size, (first, count) = self.train.micro_batch_size, self.share.of(step, self.train)
        return [
            self._batch(range(begin, min(begin + (size or count), first + count)))
            for begin in range(first, first + count, size or count)
        ]

    def _batch(self, numbers: Sequence[int]) -> CaptionBatch:
        skipped = Skipped()
        samples = [self.corpus.sample(number, skipped) for number in numbers]
        prefixes = [self._prefix(number) for number in numbers]
        captions = [sample.caption for sample in samples]
        ids, length = encode_captions(captions, self.tokenizer, self.max_text_tokens)
        batch = CaptionBatch(
            pixel_values=self.preprocessing.normalise(np.stack([s.pixels for s in samples])),
            prefix_length=torch.tensor(prefixes),
            caption_ids=ids,
            caption_length=length,
        )
        if skipped.counts:
            batch["skipped"] = dict(skipped.counts)
            batch["skipped_rows"] = skipped.examples
        return batch

    def _prefix(self, number: int) -> int:
        """How many patches of a sample the encoder may see at once: 1..num_patches - 1, or all."""
        if self.full_prefix:
            return self.num_patches
        return int(scenes.generator(self.seed, "prefix", number).integers(1, self.num_patches))


def caption_batches(
    data: CaptionData,
    train: TrainConfig,
    *,
    seed: int,
    tokenizer: Any,
    preprocessing: Preprocessing,
    num_patches: int,
    max_text_tokens: int,
    full_prefix: bool = False,
    share: Share = EVERYTHING,
) -> CaptionBatches:
    """The pre-training batches by step: pictures, captions, and a prefix length of
    1..num_patches-1 for each picture, or with `full_prefix` of all its patches.

    Opens the sources of `data`; UsageError where one cannot be read. A rank gets its
    contiguous `share` of every step.
    """
    world = world_seed(seed, data)
    size = preprocessing.image_size
    corpus = Corpus(data, world, image_size=size, max_text_tokens=max_text_tokens)
    return CaptionBatches(
        corpus,
        train,
        world,
        tokenizer,
        preprocessing,
        num_patches,
        max_text_tokens,
        full_prefix,
        share,
    )


def encode_captions(
    captions: list[str], tokenizer: Any, max_text_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
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


def picture_batch(sheets: Sequence[scenes.Scene], preprocessing: Preprocessing) -> torch.Tensor:
    """The sheets rendered at the encoder's own size and normalised: (B, 3, H, W)."""
    return preprocessing.normalise(
        np.stack([scenes.render(sheet, preprocessing.image_size) for sheet in sheets])
    )
