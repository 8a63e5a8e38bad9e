"""Probes of a pre-trained encoder on held-out handwriting: nearest neighbours, a linear classifier,
and its own losses.

Owns the bank and the queries: every training scan and every held-out scan, alone on a sheet in an
ink, place and size of its own. Refuses nothing: whoever calls brings an encoder.

Letters in shapes: Q queries, K bank, C feature channels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from aimv2_mllm.data import scenes
from aimv2_mllm.data.batches import encode_captions, picture_batch
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining
from aimv2_mllm.objective import PreTrainingBatch, PreTrainingObjective, patchify, standardise

BATCH_SIZE = 128
# DINO's protocol (Caron et al., 2021, arXiv 2104.14294, k-NN evaluation): the 20 nearest by cosine,
# each voting with exp(similarity / 0.07); the weights are those of Wu et al., 2018.
NEIGHBOURS, TEMPERATURE = 20, 0.07
RAW_SIZE = 56  # side in pixels at which the raw-pixel control sees a sheet, whatever the encoder's


def nearest_neighbours(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The label that the `k` nearest of `bank` (K, C) vote for, for each of `queries`: (Q,).

    `labels` (K,) count from 0. Nearness is the cosine, a vote weighs exp(cosine / temperature); of
    labels with equal votes the smallest wins.
    """
    bank, queries = (F.normalize(part.double(), dim=1) for part in (bank, queries))
    nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # (Q, k)
    votes = torch.zeros(len(queries), int(labels.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, labels[nearest.indices], (nearest.values / temperature).exp())
    return votes.argmax(1)


class Examples(NamedTuple):
    """What a probe learns from, and what it is asked, both centred on the former's mean.

    Without centring all cosines are near one: most of every sheet is the same paper.
    """

    bank: Tensor  # (K, C)
    labels: Tensor  # (K,)
    queries: Tensor  # (Q, C)
    truth: Tensor  # (Q,)


def digit_examples(features: Callable[[Sequence[scenes.Scene]], Tensor], seed: int) -> Examples:
    """Each training and each held-out scan alone on a sheet; `features`: sheets to (sheets, C)."""
    (bank, labels), (queries, truth) = (_features(features, split, seed) for split in _SPLITS)
    mean = bank.mean(0)
    return Examples(bank - mean, labels, queries - mean, truth)


def knn_accuracy(examples: Examples) -> float:
    """The share of queries that are told by their neighbours in the bank."""
    told = nearest_neighbours(examples.bank, examples.labels, examples.queries)
    return float((told == examples.truth).double().mean())


def linear_accuracy(examples: Examples) -> float:
    """The share of queries that a linear classifier tells, trained on the bank.

    Logistic regression over channels of unit variance in the bank, with the penalty's C at 0.1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    classifier.fit(examples.bank.numpy(), examples.labels.numpy())
    return float(classifier.score(examples.queries.numpy(), examples.truth.numpy()))


_SPLITS: tuple[scenes.Split, scenes.Split] = ("train", "heldout")


def _features(
    features: Callable[[Sequence[scenes.Scene]], Tensor], split: scenes.Split, seed: int
) -> tuple[Tensor, Tensor]:
    """The features of each scan of a split alone on a sheet, and its values."""
    scans = scenes.split_scans(split)
    sheets = [scenes.single_digit(int(scan), seed) for scan in scans]
    starts = tqdm(range(0, len(sheets), BATCH_SIZE), unit="batch", disable=None)
    rows = [features(sheets[first : first + BATCH_SIZE]) for first in starts]
    return torch.cat(rows), torch.from_numpy(scenes.scans()[1][scans])


def encoder_features(
    encoder: AIMv2Encoder, preprocessing: Preprocessing
) -> Callable[[Sequence[scenes.Scene]], Tensor]:
    """A function from sheets to the mean of the encoder's output over all patches: (sheets, C)."""

    @torch.inference_mode()
    def features(sheets: Sequence[scenes.Scene]) -> Tensor:
        output: Tensor = encoder(picture_batch(sheets, preprocessing))  # (sheets, patches, C)
        return output.mean(1).float()

    return features


def pixel_features() -> Callable[[Sequence[scenes.Scene]], Tensor]:
    """A function from sheets to their raw pixels as darkness, 255 less the grey levels.

    Darkness, since a cosine between two bright sheets of paper would tell nothing of the ink.
    """

    def features(sheets: Sequence[scenes.Scene]) -> Tensor:
        pictures = np.stack([scenes.render(sheet, RAW_SIZE) for sheet in sheets])
        return torch.from_numpy(255 - pictures).flatten(1).float()

    return features


def fresh_encoder(config: EncoderConfig, seed: int) -> AIMv2Encoder:
    """An encoder of the same size that has learned nothing, drawn with `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AIMv2Encoder(config).eval()


@torch.inference_mode()
def held_out_losses(
    model: AIMv2ForPreTraining,
    tokenizer: Any,
    preprocessing: Preprocessing,
    sheets: Sequence[scenes.Scene],
    *,
    seed: int,
) -> dict[str, float]:
    """The losses of pre-training on sheets that were not trained on, their prefixes drawn once.

    `caption_loss` in nats per token; `pixel_loss`, squared error per standardised value; and
    `pixel_loss_flat`, the same for a model that paints every patch in one tone.
    """
    objective = PreTrainingObjective(model.encoder.config.patch_size, tokenizer.eos_token_id)
    batches = _batches(model, tokenizer, preprocessing, sheets, seed)
    counts = [objective.targets(batch) for batch in batches]
    totals = {kind: sum(count[kind] for count in counts) for kind in counts[0]}
    caption = pixel = flat = 0.0
    for batch in tqdm(batches, unit="batch", disable=None):
        loss = objective(model, batch, totals)
        caption, pixel = caption + float(loss.text), pixel + float(loss.image)
        targets = standardise(patchify(batch["pixel_values"], objective.patch_size))  # (B, I, 588)
        hidden = torch.arange(targets.shape[1]) >= batch["prefix_length"][:, None]
        flat += float(targets[hidden].square().mean(-1).sum()) / totals["image"]
    return {"caption_loss": caption, "pixel_loss": pixel, "pixel_loss_flat": flat}


def _batches(
    model: AIMv2ForPreTraining,
    tokenizer: Any,
    preprocessing: Preprocessing,
    sheets: Sequence[scenes.Scene],
    seed: int,
) -> list[PreTrainingBatch]:
    num_patches = model.encoder.config.num_patches
    most = model.decoder_config.max_text_tokens
    draws = [scenes.generator(seed, "prefix", index) for index in range(len(sheets))]
    prefixes = torch.tensor([int(draw.integers(1, num_patches)) for draw in draws])
    batches = []
    for first in range(0, len(sheets), BATCH_SIZE):
        part = slice(first, first + BATCH_SIZE)
        captions = [scenes.caption(sheet) for sheet in sheets[part]]
        ids, lengths = encode_captions(captions, tokenizer, most)
        batch = PreTrainingBatch(
            caption_ids=ids,
            caption_length=lengths,
            pixel_values=picture_batch(sheets[part], preprocessing),
            prefix_length=prefixes[part],
        )
        batches.append(batch)
    return batches
