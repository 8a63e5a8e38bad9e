"""Zero-shot classification with an image-text (LiT) model: classes are told by their names alone.

Owns how names become prompts and prompts one vector for a class. Learns nothing, so there is
nothing to choose.

Letters in shapes: B pictures, K classes, E the width that both towers share.
"""

from collections.abc import Callable, Sequence
from os.path import isdir
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.pairs.batches import encode_captions
from aimv2_mllm.data.questions.labelled import Labelled
from aimv2_mllm.errors import UsageError, first_line
from aimv2_mllm.evaluation.examples import look
from aimv2_mllm.evaluation.probes import describe, majority, score
from aimv2_mllm.folders import stage_record
from aimv2_mllm.model.hub import locate
from aimv2_mllm.model.lit_weights import load_lit
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.objective import ended

# From texts to their token ids (C, T), each with the end-of-text token.
Encode = Callable[[list[str]], Tensor]
NAME = "{}"  # stands for the class in a template
PROMPTS_AT_ONCE = 256


class TwoTowers(Protocol):
    """What is needed of a LiT model, an `nn.Module` with these two."""

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Vectors (B, E) of pictures (B, 3, H, W)."""

    def encode_text(self, ids: Tensor) -> Tensor:
        """Vectors (B, E) of tokens (B, T), padded behind their end."""


class LitTower:
    """The picture side of a LiT model as a tower that has one token, its vector."""

    kind = "aimv2 (LiT)"
    notes: Sequence[str] = ()

    def __init__(self, model: Any, preprocessing: Preprocessing) -> None:
        self.model, self.preprocessing = model.eval(), preprocessing

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.model
        return module

    def prepare(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self.preprocessing.prepare(pictures)

    @torch.inference_mode()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        vectors: Tensor = self.model.encode_image(pixel_values)
        return vectors.float()[:, None]  # (B, 1, E)


def load_lit_tower(source: str) -> tuple[LitTower, Encode]:
    """The LiT model of a folder or hub id (`org/name@revision`), and how it reads prompts: as a
    stage of ours read its captions, else as its tokenizer says."""
    folder = locate(source)
    model, tokenizer = load_lit(folder), _tokenizer(source)
    most = model.config.text.max_position_embeddings
    is_ours = stage_record(folder).get("kind") == "lit"
    encode = _as_captions(tokenizer, most) if is_ours else _as_texts(tokenizer, most)
    return LitTower(model, Preprocessing.load(folder)), encode


def _as_captions(tokenizer: Any, most: int) -> Encode:
    def encode(texts: list[str]) -> Tensor:
        ids, length = encode_captions(texts, tokenizer, most - 1)
        return ended(ids, length, tokenizer.eos_token_id)

    return encode


def _as_texts(tokenizer: Any, most: int) -> Encode:
    def encode(texts: list[str]) -> Tensor:
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        ids: Tensor = tokens["input_ids"]
        return ids

    return encode


def _tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    name, revision = source, None
    if not isdir(source) and "@" in source:
        name, _, revision = source.partition("@")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{source}: no tokenizer can be loaded from there ({first_line(error)})"
        ) from None


def handwriting_templates() -> list[str]:
    """The captions of sheets with one digit, in every ink and at every place."""
    digits = [
        scenes.Digit(0, ink, place, 0, 0.0, 0.0, 0.0)
        for ink in scenes.INKS
        for place in scenes.PLACES
    ]
    return [scenes.phrase(digit).replace("0", NAME) for digit in digits]


def read_templates(path: Path) -> list[str]:
    """The prompts of a text file, one a line, each with one {} where the class comes."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"{path}: no templates can be read ({reason})") from None
    templates = [line.strip() for line in lines if line.strip()]
    wrong = [line for line in templates if line.count(NAME) != 1]
    if wrong or not templates:
        what = f"{wrong[0]!r} has not one {NAME}" if wrong else "is empty"
        raise UsageError(f"{path}: {what}; write a prompt a line, as in: a photo of a {NAME}.")
    return templates


@torch.inference_mode()
def class_vectors(
    model: TwoTowers, encode: Encode, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """A unit vector for each class, the mean of those of its prompts: (K, E).

    Underscores in the names of classes become spaces.
    """
    names = [name.replace("_", " ") for name in classes]
    prompts = [template.replace(NAME, name) for name in names for template in templates]
    vectors = []
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        texts = prompts[first : first + PROMPTS_AT_ONCE]
        vectors.append(F.normalize(model.encode_text(encode(texts)).float(), dim=-1))
    averaged = torch.cat(vectors).view(len(names), len(templates), -1).mean(1)
    return F.normalize(averaged, dim=-1)


def zero_shot(
    tower: LitTower, encode: Encode, data: Labelled, templates: Sequence[str]
) -> dict[str, Any]:
    """How many test pictures lie nearest to their class's vector, as `probes.probe` says it.

    The control `shuffled` gives each class the prompts of the one after it: as many as by chance if
    prompts mean nothing to the model, and fewer if they do. The model's scale does not change which
    is the nearest, and is left out.
    """
    test = look(tower, data.test, "test pictures")
    vectors = class_vectors(tower.model, encode, data.classes, templates)
    told = (F.normalize(test.features, dim=-1) @ vectors.T).argmax(-1)
    protocol = {"templates": list(templates), "prompts": "normalised, averaged, normalised"}
    return {
        "tower": describe(tower),
        "data": {
            "classes": data.classes,
            "split": data.split,
            "test": len(test.labels),
            "skipped": {"test": len(test.skipped)},
        },
        "probes": {"zeroshot": score(told, test.labels) | {"protocol": protocol}},
        "controls": {
            "majority": majority(data.train.labels, test.labels),
            "shuffled": score((told - 1) % len(data.classes), test.labels),
        },
    }
