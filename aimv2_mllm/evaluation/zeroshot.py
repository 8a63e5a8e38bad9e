"""Zero-shot classification with an image-text (LiT) model: classes are told by their names alone.

Owns how names become prompts and prompts one vector for a class. Learns nothing, so there is
nothing to choose.

Letters in shapes: B pictures, K classes, E the width that both towers share.
"""

from collections.abc import Sequence
from os.path import isdir
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from aimv2_mllm.data.labelled import Labelled
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation.examples import look
from aimv2_mllm.evaluation.probes import describe, majority, score
from aimv2_mllm.model.preprocessing import Preprocessing

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

    def __init__(self, model: Any, preprocessing: Preprocessing, max_tokens: int) -> None:
        self.model, self.preprocessing = model.eval(), preprocessing
        self.max_tokens = max_tokens  # of a prompt, for which the text tower has positions

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


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a LiT model, by folder or hub id (`org/name@revision`)."""
    from transformers import AutoTokenizer

    name, revision = source, None
    if not isdir(source) and "@" in source:
        name, _, revision = source.partition("@")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{source}: no tokenizer can be loaded from there ({line})") from None


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
    model: TwoTowers,
    tokenizer: Any,
    classes: Sequence[str],
    templates: Sequence[str],
    max_tokens: int,
) -> Tensor:
    """A unit vector for each class, the mean of those of its prompts: (K, E).

    Underscores in the names of classes become spaces; prompts are cut at `max_tokens`.
    """
    names = [name.replace("_", " ") for name in classes]
    prompts = [template.replace(NAME, name) for name in names for template in templates]
    vectors = []
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        texts = prompts[first : first + PROMPTS_AT_ONCE]
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        )
        vectors.append(F.normalize(model.encode_text(tokens["input_ids"]).float(), dim=-1))
    averaged = torch.cat(vectors).view(len(names), len(templates), -1).mean(1)
    return F.normalize(averaged, dim=-1)


def zero_shot(
    tower: LitTower, tokenizer: Any, data: Labelled, templates: Sequence[str]
) -> dict[str, Any]:
    """How many test pictures lie nearest to their class's vector, as `probes.probe` says it.

    The model's scale does not change which is the nearest, and is left out.
    """
    test = look(tower, data.test, "test pictures")
    vectors = class_vectors(tower.model, tokenizer, data.classes, templates, tower.max_tokens)
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
        "controls": {"majority": majority(data.train.labels, test.labels)},
    }
