"""The batches of a stage whose model talks, as a pure function of the step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimv2_mllm.data.batches import EVERYTHING, Share, micro_batches, world_seed
from aimv2_mllm.data.conversations import IGNORED
from aimv2_mllm.data.drawing import Skipped
from aimv2_mllm.data.feature_shards import picture_key
from aimv2_mllm.data.feature_store import FeatureStore
from aimv2_mllm.data.talks import Seen, TalkCorpus, TalkSample
from aimv2_mllm.data.templates import Encoded, Writer
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.objective import ConversationBatch
from aimv2_mllm.recipe_data import ConversationData
from aimv2_mllm.recipe_train import TrainConfig

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
        """The rank's share of the step's samples in micro-batches of like length."""
        skipped = Skipped()

        def read(numbers: Sequence[int]) -> list[TalkSample]:
            return [self.corpus.sample(n, self.writer, skipped, self._see) for n in numbers]

        def length(sample: TalkSample) -> int:
            return len(sample.encoded.ids)

        batches: list[TalkBatch] = micro_batches(
            self.train, read, self._collated, length, share=self.share
        )(step)
        if skipped.counts:
            batches[0]["skipped"] = dict(skipped.counts)
            batches[0]["skipped_rows"] = skipped.examples
        return batches

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
            batch["pixel_values"] = self.preprocessing.normalise(np.stack(others))
        if kept:
            batch["features"] = torch.stack(kept)
        if self.features is not None:
            batch["is_cached"] = torch.tensor([isinstance(one, Tensor) for one in pictures])
        return batch

    def _see(self, content: bytes) -> Seen:
        """An encoded picture, or BLANK, as pixels, or its features where they are kept."""
        if self.features is not None:
            key = picture_key(content, self.corpus.image_aspect)
            features = self.features.get(key)
            if features is not None:
                return features
        return self.pixels(content)

    def pixels(self, content: bytes) -> np.ndarray:
        """An encoded picture, or BLANK, as (S, S, 3) uint8; `Unusable` where it is neither."""
        assert self.preprocessing is not None
        if content == BLANK:
            size = self.preprocessing.image_size
            return np.zeros((size, size, 3), np.uint8)
        return self.corpus.pixels(content)


def conversation_batches(
    data: ConversationData,
    train: TrainConfig,
    *,
    seed: int,
    tokenizer: Any,
    preprocessing: Preprocessing | None,
    num_image_tokens: int = 0,
    share: Share = EVERYTHING,
) -> TalkBatches:
    """The conversation batches by step: about pictures, or, without `preprocessing`, in words
    alone. Each picture stands for `num_image_tokens` tokens.

    Opens the sources of `data`; UsageError where one cannot be read, or where the tokenizer's
    template does not tell what the assistant says. A rank gets its contiguous `share` of every
    step.
    """
    writer = Writer(tokenizer, data.template, num_image_tokens=num_image_tokens)
    corpus = TalkCorpus(data, world_seed(seed, data), preprocessing)
    return TalkBatches(corpus, train, writer, preprocessing, share)


def pack(rows: Sequence[Encoded]) -> ConversationBatch:
    """`rows` one after the other, as the text of a batch."""
    lengths = [len(row.ids) for row in rows]
    labels = [np.concatenate([[IGNORED], row.labels[1:]]) for row in rows]
    return ConversationBatch(
        lengths=torch.tensor(lengths),
        input_ids=torch.from_numpy(np.concatenate([row.ids for row in rows]))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        labels=torch.from_numpy(np.concatenate(labels))[None],
    )
