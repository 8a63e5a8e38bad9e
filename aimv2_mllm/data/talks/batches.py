"""The batches of a stage whose model talks, as a pure function of the step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimv2_mllm.data.drawing import Skipped
from aimv2_mllm.data.features.shards import picture_key
from aimv2_mllm.data.features.store import FeatureStore
from aimv2_mllm.data.pairs.batches import EVERYTHING, Share, micro_batches, world_seed
from aimv2_mllm.data.pictures.own_shapes import OwnShapes
from aimv2_mllm.data.talks.corpus import Draft, Seen, TalkCorpus, TalkSample
from aimv2_mllm.data.talks.packing import TalkSize, plan
from aimv2_mllm.data.talks.templates import Encoded, Writer
from aimv2_mllm.marks import UNSUPERVISED
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.objective import ConversationBatch
from aimv2_mllm.recipe.data import ConversationData
from aimv2_mllm.recipe.train import TrainConfig

BLANK = b"blank"  # in place of an encoded picture: one that is black


class TalkBatch(ConversationBatch, total=False):
    """A batch of conversations with what was left out for it, where something was."""

    skipped: dict[str, int]  # rows by reason, and turns
    skipped_rows: list[str]  # some of them, in words


@dataclass(frozen=True)
class TalkBatches:
    """One rank's conversations by step; it can be sent to another process."""

    corpus: TalkCorpus
    train: TrainConfig
    writer: Writer
    preprocessing: Preprocessing | None
    share: Share = EVERYTHING
    features: FeatureStore | None = None  # of the pictures, where they are kept

    def __call__(self, step: int) -> list[TalkBatch]:
        """The rank's part of the step's samples, in micro-batches of like length or, with
        `micro_batch_tokens`, as `packing.plan` has them."""
        skipped = Skipped()

        def collated(drafts: Sequence[Draft]) -> Any:
            samples = [draft.sample(self._see, skipped) for draft in drafts]
            # Again: a row that stands in for one with a bad picture has another length.
            return self._collated(sorted(samples, key=_length))

        batches: list[TalkBatch]
        if self.train.micro_batch_tokens is None:
            batches = micro_batches(self.train, self._drafts, collated, _length, share=self.share)(
                step
            )
        else:
            batches = [collated(drafts) for drafts in self._packed(step)]
        if skipped.counts:
            batches[0]["skipped"] = dict(skipped.counts)
            batches[0]["skipped_rows"] = skipped.examples
        return batches

    def _drafts(self, numbers: Sequence[int]) -> list[Draft]:
        return [self.corpus.draft(number, self.writer) for number in numbers]

    def _packed(self, step: int) -> list[list[Draft]]:
        """This rank's micro-batches by tokens. Each rank reads the text of the whole step, and so
        plans the same; of the others' pictures it reads none.

        What stands in for a row whose picture is bad stays where that row was, so that such a
        micro-batch may have more tokens than the budget; files that are missing show in the text.
        """
        assert self.train.micro_batch_tokens is not None
        size = self.train.batch_size
        drafts = self._drafts(range(step * size, (step + 1) * size))
        ranks = plan(
            [TalkSize(_length(draft), draft.has_pictures) for draft in drafts],
            num_ranks=self.share.size,
            budget=self.train.micro_batch_tokens,
            blank=len(self.writer.blank().ids),
        )
        return [[drafts[index] for index in members] for members in ranks[self.share.rank]]

    def _collated(self, samples: Sequence[TalkSample]) -> ConversationBatch:
        rows = [sample.encoded for sample in samples]
        pictures = [picture for sample in samples for picture in sample.pictures]
        if self.preprocessing is None:
            return pack(rows)
        if not pictures:
            # Where nobody sees anything the connector would get no gradient at all, and neither
            # other ranks nor a model of which nothing else is trained could do with that. A blank
            # picture after the last word, where nothing is left to learn, gives it one of zeros.
            last, blank = rows[-1], self.writer.blank()
            rows[-1] = Encoded(
                np.concatenate([last.ids, blank.ids]), np.concatenate([last.labels, blank.labels])
            )
            pictures.append(self._see(BLANK))
        batch = pack(rows)
        kept = [picture for picture in pictures if isinstance(picture, Tensor)]
        others = [picture for picture in pictures if not isinstance(picture, Tensor)]
        if others:
            batch["pixel_values"] = self._laid(others)
            if self.corpus.image_aspect == "native":
                batch["image_sizes"] = torch.tensor([one.shape[:2] for one in others])
        if kept:
            batch["features"] = torch.stack(kept)
        if self.features is not None:
            batch["is_cached"] = torch.tensor([isinstance(one, Tensor) for one in pictures])
        return batch

    def _laid(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Pictures (H, W, 3) as pixel_values (K, 3, H, W), smaller ones in the corner of zeros."""
        assert self.preprocessing is not None
        if len({picture.shape for picture in pictures}) == 1:
            return self.preprocessing.normalise(np.stack(pictures))
        height, width = np.max([picture.shape[:2] for picture in pictures], axis=0)
        values = torch.zeros(len(pictures), 3, int(height), int(width))
        for value, picture in zip(values, pictures, strict=True):
            own = self.preprocessing.normalise(picture[None])[0]
            value[:, : own.shape[1], : own.shape[2]] = own
        return values

    def _see(self, content: bytes) -> Seen:
        """An encoded picture, or BLANK, as pixels, or its features where they are kept."""
        if self.features is not None:
            key = picture_key(content, self.corpus.image_aspect)
            features = self.features.get(key)
            if features is not None:
                return features
        return self.pixels(content)

    def pixels(self, content: bytes) -> np.ndarray:
        """An encoded picture, or BLANK, as (H, W, 3) uint8; `Unusable` where it is neither."""
        assert self.preprocessing is not None
        if content == BLANK:
            size = self.preprocessing.image_size
            return np.zeros((size, size, 3), np.uint8)
        return self.corpus.pixels(content)


def _length(one: Draft | TalkSample) -> int:
    return len(one.encoded.ids)


def conversation_batches(
    data: ConversationData,
    train: TrainConfig,
    *,
    seed: int,
    tokenizer: Any,
    preprocessing: Preprocessing | None,
    num_image_tokens: int = 0,
    shapes: OwnShapes | None = None,
    share: Share = EVERYTHING,
) -> TalkBatches:
    """The conversation batches by step: about pictures, or, without `preprocessing`, in words
    alone. Each picture stands for `num_image_tokens` tokens, or with `shapes` for its own.

    Opens the sources of `data`; UsageError where one cannot be read, or where the tokenizer's
    template does not tell what the assistant says. A rank gets its `share` of every step: with
    `micro_batch_size` a contiguous one.
    """
    writer = Writer(tokenizer, data.template, num_image_tokens=num_image_tokens)
    corpus = TalkCorpus(data, world_seed(seed, data), preprocessing, shapes)
    return TalkBatches(corpus, train, writer, preprocessing, share)


def pack(rows: Sequence[Encoded]) -> ConversationBatch:
    """`rows` one after the other, as the text of a batch."""
    lengths = [len(row.ids) for row in rows]
    labels = [np.concatenate([[UNSUPERVISED], row.labels[1:]]) for row in rows]
    return ConversationBatch(
        lengths=torch.tensor(lengths),
        input_ids=torch.from_numpy(np.concatenate([row.ids for row in rows]))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        labels=torch.from_numpy(np.concatenate(labels))[None],
    )
