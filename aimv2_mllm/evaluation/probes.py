"""Probes of a frozen tower on labelled pictures: neighbours, a linear classifier, attention.

Owns what is asked of the features and the controls beside it, and every number that a probe gives.
Refuses to choose anything by the test pictures.

Letters in shapes: Q queries, K bank, C feature channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2_mllm.data.questions.labelled import Labelled
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation import attentive
from aimv2_mllm.evaluation.examples import BATCH_SIZE, Examples, centred, look
from aimv2_mllm.evaluation.intervals import wilson_interval
from aimv2_mllm.evaluation.vision import Seeing
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.shards import weights_sha256

# DINO's protocol (Caron et al., 2021, arXiv 2104.14294, k-NN evaluation): the 20 nearest by cosine,
# each voting with exp(similarity / 0.07); the weights are those of Wu et al., 2018.
NEIGHBOURS, TEMPERATURE = 20, 0.07
PENALTY = 0.1  # scikit-learn's C, fixed: nothing is chosen for the linear probe


def probe(
    tower: Seeing,
    data: Labelled,
    kinds: Sequence[str],
    *,
    seed: int,
    k: int = NEIGHBOURS,
    epochs: int = attentive.EPOCHS,
) -> dict[str, Any]:
    """What the probes `kinds`, keys of `KINDS`, tell of the test pictures: counts, shares with
    their 95 % intervals, and two controls that need no tower.

    Raises UsageError where there are fewer than `k` pictures to learn from.
    """
    if "knn" in kinds and k > len(data.train.labels):
        raise UsageError(
            f"k is {k}, and there are only {len(data.train.labels):,} training pictures: "
            "take a smaller k or more pictures"
        )
    keep_tokens = "attentive" in kinds
    train = look(tower, data.train, "training pictures", keep_tokens=keep_tokens)
    test = look(tower, data.test, "test pictures", keep_tokens=keep_tokens)
    settings = {"k": k, "epochs": epochs, "seed": seed}
    results = {kind: KINDS[kind](train, test, settings) for kind in kinds}
    bank, queries = (part.thumbnails.float() for part in (train, test))
    nearest = min(k, len(bank))
    return {
        "tower": describe(tower),
        "data": {
            "classes": data.classes,
            "split": data.split,
            "train": len(train.labels),
            "test": len(test.labels),
            "skipped": {"train": len(train.skipped), "test": len(test.skipped)},
        },
        "seed": seed,
        "probes": results,
        "controls": {
            "majority": majority(data.train.labels, test.labels),
            "pixels": _neighbours(bank, queries, train.labels, test.labels, nearest),
        },
    }


def _knn(train: Examples, test: Examples, settings: dict[str, int]) -> dict[str, Any]:
    k = settings["k"]
    if k > len(train.labels):
        raise UsageError(f"k is {k}, and only {len(train.labels):,} training pictures are sound")
    protocol = {"k": k, "temperature": TEMPERATURE, "features": "mean of the patches, centred"}
    found = _neighbours(train.features, test.features, train.labels, test.labels, k)
    return found | {"protocol": protocol}


def _neighbours(
    bank: Tensor, queries: Tensor, labels: Tensor, truth: Tensor, k: int
) -> dict[str, Any]:
    bank, queries = centred(bank, queries)
    return score(nearest_neighbours(bank, labels, queries, k=k), truth)


def nearest_neighbours(
    bank: Tensor, labels: Tensor, queries: Tensor, *, k: int = NEIGHBOURS
) -> Tensor:
    """The label that the `k` nearest of `bank` (K, C) vote for, for each of `queries`: (Q,).

    `labels` (K,) count from 0. Nearness is the cosine, a vote weighs exp(cosine / TEMPERATURE); of
    labels with equal votes the smallest wins.
    """
    bank, told = F.normalize(bank, dim=1), []
    for part in torch.split(F.normalize(queries, dim=1), BATCH_SIZE):
        nearest = (part @ bank.T).topk(k, dim=1)  # (Q, k)
        votes = torch.zeros(len(part), int(labels.max()) + 1, dtype=torch.float64)
        weights = (nearest.values.double() / TEMPERATURE).exp()
        told.append(votes.scatter_add_(1, labels[nearest.indices], weights).argmax(1))
    return torch.cat(told)


def _linear(train: Examples, test: Examples, settings: dict[str, int]) -> dict[str, Any]:
    """Logistic regression over channels of unit variance in the training pictures."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    bank, queries = centred(train.features, test.features)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTY, max_iter=1000))
    classifier.fit(bank.numpy(), train.labels.numpy())
    told = torch.from_numpy(classifier.predict(queries.numpy()))
    protocol = {"C": PENALTY, "features": "mean of the patches, unit variance"}
    return score(told, test.labels) | {"protocol": protocol}


def _attentive(train: Examples, test: Examples, settings: dict[str, int]) -> dict[str, Any]:
    assert train.tokens is not None, "tokens were not kept"
    assert test.tokens is not None, "tokens were not kept"
    told = attentive.attentive_probe(
        train.tokens, train.labels, test.tokens, seed=settings["seed"], epochs=settings["epochs"]
    )
    sweep = [
        {**one._asdict(), "accuracy_choosing": right / told.num_choosing}
        for one, right in told.right.items()
    ]
    protocol = {
        "epochs": settings["epochs"],
        "batch_size": told.batch_size,
        "clip": attentive.CLIP,
        "last_lr": attentive.LAST_LR,
        "augmentation": "none",
        "trained_on": told.num_learned,
        "chosen_by": f"{told.num_choosing} training pictures that were not trained on",
        "chosen": told.chosen._asdict(),
        "sweep": sweep,
    }
    return score(told.classes, test.labels) | {"protocol": protocol}


# name of a probe -> what it tells of the test pictures, learned from the training pictures
KINDS: dict[str, Callable[[Examples, Examples, dict[str, int]], dict[str, Any]]] = {
    "knn": _knn,
    "linear": _linear,
    "attentive": _attentive,
}


def score(told: Tensor, truth: Tensor) -> dict[str, Any]:
    """The share of `told` that is the truth, with its 95 % interval (Wilson)."""
    right, count = int((told == truth).sum()), len(truth)
    low, high = wilson_interval(right, count)
    return {"accuracy": right / count, "interval": [low, high], "right": right, "count": count}


def majority(labels: Sequence[int], truth: Tensor) -> dict[str, Any]:
    """The score of always saying the class that is most frequent in `labels`."""
    return score(torch.tensor(labels).mode().values.expand(len(truth)), truth)


def describe(tower: Seeing) -> dict[str, Any]:
    """What a tower is, for the record: its kind, what it looks at, the hash of its weights."""
    return {
        "model_type": tower.kind,
        **asdict(tower.preprocessing),
        "sha256": weights_sha256(tower.module.state_dict()),
        "notes": list(tower.notes),
    }


def fresh_encoder(config: EncoderConfig, seed: int) -> AIMv2Encoder:
    """An encoder of the same size that has learned nothing, drawn with `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AIMv2Encoder(config).eval()
