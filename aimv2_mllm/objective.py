"""The losses: tensors in, named parts out. They stand between a model and the training loop.

Owns what is scored and how: the next-patch and caption loss of pre-training, the answer loss of the
language-model stages. Knows nothing of models but how they are called. A loss is this micro-batch's
*sum* over the *step's* number of targets, so that adding up micro-batches (or ranks) gives the loss
and the gradient of the whole batch.

Letters in shapes: B samples, I patches, T caption tokens (of conversations: tokens of all of them),
K pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2_mllm.marks import UNSUPERVISED


class PreTrainingBatch(TypedDict):
    """Images with captions; `caption_ids` is padded with anything, `prefix_length` in 1..I-1."""

    pixel_values: Tensor  # (B, 3, H, W)
    prefix_length: Tensor  # (B,) int64
    caption_ids: Tensor  # (B, T) int64
    caption_length: Tensor  # (B,) int64


class MixedSizesBatch(TypedDict):
    """As `PreTrainingBatch`, with images of different sizes."""

    pixel_values: Sequence[Tensor]  # B of (3, H, W)
    prefix_length: Tensor  # (B,) int64
    caption_ids: Tensor  # (B, T) int64
    caption_length: Tensor  # (B,) int64


class ConversationBatch(TypedDict):
    """Conversations in tokens, packed: one after the other; `labels` are `input_ids` where
    supervised, -100 elsewhere and at the first of each, which nothing predicts."""

    lengths: Tensor  # (B,) int64, tokens of each; they add up to T
    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, from 0 on in each
    labels: Tensor  # (1, T) int64
    pixel_values: NotRequired[Tensor]  # (K, 3, H, W), in the order of the text
    image_sizes: NotRequired[Tensor]  # (K, 2), height and width of each where they differ
    features: NotRequired[Tensor]  # (C, N, D), of the pictures that are kept; pixels of the others
    is_cached: NotRequired[Tensor]  # (K,) bool: which of all pictures, in the order of the text


class Loss(NamedTuple):
    """The parts of the pre-training loss, scalars; `total` is what is differentiated."""

    total: Tensor
    image: Tensor
    text: Tensor


class PairLoss(NamedTuple):
    """The contrastive loss, scalars: choosing the text for an image, and the image for a text."""

    total: Tensor
    text: Tensor
    image: Tensor


class AnswerLoss(NamedTuple):
    """The answer loss, scalars; both are the same number, under the names that get logged."""

    total: Tensor
    text: Tensor


def patchify(pixel_values: Tensor, patch_size: int) -> Tensor:
    """The patches of `pixel_values` (B, C, H, W) in raster order: (B, I, values of a patch).

    Within a patch the values go by row, then column, then channel: 588 = 14 * 14 * 3.
    """
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def standardise(patches: Tensor) -> Tensor:
    """Each patch less its own mean, over the root of its unbiased variance + 1e-6: (..., 588)."""
    centred = patches - patches.mean(-1, keepdim=True)
    # Not torch.var, which warns of a batch without a scored patch.
    variance = centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)
    return centred * torch.rsqrt(variance + 1e-6)


@dataclass(frozen=True)
class PreTrainingObjective:
    """Next-patch regression and caption cross-entropy: total = text_weight * text + alpha * image.

    `alpha` is 0.4 in the paper, flat between 0.2 and 0.6, and `text_weight` 1. With a weight of 0
    captions are not looked at: that is the objective of AIM, the predecessor.
    """

    patch_size: int
    end_token_id: int
    alpha: float = 0.4
    text_weight: float = 1.0

    def targets(self, batch: PreTrainingBatch | MixedSizesBatch) -> dict[str, int]:
        """What this batch scores: how many patches outside prefixes, caption and end tokens."""
        areas = [image.shape[-2] * image.shape[-1] for image in batch["pixel_values"]]
        num_patches = torch.tensor(areas) // self.patch_size**2  # (B,)
        scored = num_patches - batch["prefix_length"].cpu()
        return {
            "image": int(scored.clamp(min=0).sum()),
            "text": int((batch["caption_length"] + 1).sum()) if self.text_weight else 0,
        }

    def __call__(
        self, model: nn.Module, batch: PreTrainingBatch | MixedSizesBatch, totals: dict[str, int]
    ) -> Loss:
        """This micro-batch's share of the loss; `totals` are the whole step's `targets`, added."""
        seen: Any = batch if self.text_weight else {**batch, **_without_words(batch)}
        patches, words = model(**seen, scored_only=True)
        image_targets = self._patch_targets(batch)  # (P, 588)
        errors = F.mse_loss(patches.float(), image_targets, reduction="sum")
        image = errors / (image_targets.shape[-1] * max(totals["image"], 1))
        # [start] w1 … wT predicts w1 … wT [end].
        text = F.cross_entropy(words.float(), self._word_targets(seen), reduction="sum")
        # Without words only the end is left to predict: nothing to learn, and nothing to report.
        text = text / max(totals["text"], 1) if self.text_weight else text * 0
        return Loss(self.text_weight * text + self.alpha * image, image, text)

    def _patch_targets(self, batch: PreTrainingBatch | MixedSizesBatch) -> Tensor:
        """The standardised patches j >= M in (sample, patch) order: (P, 588)."""
        images, size = batch["pixel_values"], self.patch_size
        if not isinstance(images, Tensor):
            pairs = zip(images, batch["prefix_length"].tolist(), strict=True)
            scored = [patchify(image[None].float(), size)[0, m:] for image, m in pairs]
            return standardise(torch.cat(scored))
        patches = patchify(images.float(), size)  # (B, I, 588)
        positions = torch.arange(patches.shape[1], device=patches.device)
        return standardise(patches[positions >= batch["prefix_length"][:, None]])

    def _word_targets(self, batch: PreTrainingBatch | MixedSizesBatch) -> Tensor:
        """w1 … wT [end] of each sample, one after the other: (Q,)."""
        ids, length = batch["caption_ids"], batch["caption_length"]
        targets = ended(ids, length, self.end_token_id)  # (B, T + 1)
        places = torch.arange(targets.shape[1], device=targets.device)
        return targets[places <= length[:, None]]


def _without_words(batch: PreTrainingBatch | MixedSizesBatch) -> dict[str, Tensor]:
    ids, length = batch["caption_ids"], batch["caption_length"]
    return {"caption_ids": ids[:, :0], "caption_length": torch.zeros_like(length)}


def ended(caption_ids: Tensor, caption_length: Tensor, end_token_id: int) -> Tensor:
    """w1 … wT [end] of each of the captions (B, T), and anything after it: (B, T + 1)."""
    # By length, never by padding id: a tokenizer may pad with its end token.
    return F.pad(caption_ids, (0, 1)).scatter(1, caption_length[:, None], end_token_id)


@dataclass(frozen=True)
class ContrastiveObjective:
    """Which text belongs to which image, and the other way round (CLIP's loss, LiT's here).

    The wrong ones are those of the same micro-batch, on the same rank: its size is part of what is
    learned. A batch is that of pre-training; its prefixes are not looked at.
    """

    end_token_id: int

    def targets(self, batch: PreTrainingBatch) -> dict[str, int]:
        """What this batch scores: its pairs."""
        return {"pairs": len(batch["caption_ids"])}

    def __call__(
        self, model: nn.Module, batch: PreTrainingBatch, totals: dict[str, int]
    ) -> PairLoss:
        """This micro-batch's share of the loss; `totals` are the whole step's `targets`, added."""
        texts = ended(batch["caption_ids"], batch["caption_length"], self.end_token_id)
        logits = model(batch["pixel_values"], texts).float()  # (B, B): images by texts
        right = torch.arange(len(logits), device=logits.device)
        count = max(totals["pairs"], 1)
        text = F.cross_entropy(logits, right, reduction="sum") / count
        image = F.cross_entropy(logits.t(), right, reduction="sum") / count
        return PairLoss((text + image) / 2, text, image)


class AnswerObjective:
    """Next-token cross-entropy on the supervised tokens of conversations (the answers); the model
    is an `Answering`, or whatever gives their sum."""

    def targets(self, batch: ConversationBatch) -> dict[str, int]:
        """What this batch scores: its supervised tokens."""
        return {"text": int((batch["labels"] != UNSUPERVISED).sum())}

    def __call__(
        self, model: nn.Module, batch: ConversationBatch, totals: dict[str, int]
    ) -> AnswerLoss:
        """This micro-batch's share of the loss; `totals` are the whole step's `targets`, added."""
        text = model(**batch) / max(totals["text"], 1)
        return AnswerLoss(text, text)
