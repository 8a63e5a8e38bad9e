"""A model's greedy answers to questions about held-out sheets, and how these are scored.

Owns what counts as right. Prompts are the tokenizer's own chat template with the image mark
repeated, as in training.

Letters in shapes: S sheets, M image tokens, E the LLM's width.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from aimv2_mllm.data import scenes
from aimv2_mllm.data.batches import picture_batch
from aimv2_mllm.data.conversations import said
from aimv2_mllm.data.held_out import Asked
from aimv2_mllm.data.templates import Asker
from aimv2_mllm.model import llms, mllm
from aimv2_mllm.model.batched import Row, answer_rows
from aimv2_mllm.model.preprocessing import Preprocessing

BATCH_SIZE = 100
ANSWER_TOKENS = 16  # the longest right answer, "bottom right", has at most 13 (single bytes)
CAPTION_TOKENS = 160  # four digits in words are about 130 characters


@dataclass(frozen=True)
class Speaker:
    """A model that answers, with what its prompts need; without `preprocessing` it has no eyes."""

    model: Any
    tokenizer: Any
    preprocessing: Preprocessing | None = None
    num_image_tokens: int = 0


def load_mllm(folder: Path) -> Speaker:
    """The Llava in `folder` in float32, on the CPU, with its processor's tokenizer and pictures."""
    model, processor = mllm.load_llava(folder)
    return Speaker(model.eval(), processor.tokenizer, *mllm.pictures_of(processor))


def load_language_model(folder: Path) -> Speaker:
    """The LLM in `folder` in float32, on the CPU, with its tokenizer."""
    return Speaker(llms.load_llm(str(folder)).eval(), llms.load_tokenizer(str(folder)))


@torch.inference_mode()
def look(speaker: Speaker, sheets: Sequence[scenes.Scene]) -> Tensor:
    """What the LLM gets to see of each sheet, the connector's image tokens: (S, M, E)."""
    assert speaker.preprocessing is not None, "a language model has no eyes"
    tokens = []
    for first in range(0, len(sheets), BATCH_SIZE):
        pictures = picture_batch(sheets[first : first + BATCH_SIZE], speaker.preprocessing)
        seen = speaker.model.get_image_features(pixel_values=pictures.to(speaker.model.device))
        tokens.append(torch.stack(tuple(seen.pooler_output)))
    return torch.cat(tokens)


@torch.inference_mode()
def answer(
    speaker: Speaker,
    questions: Sequence[str],
    *,
    seen: Tensor | None = None,
    about: Sequence[int] = (),
    max_new_tokens: int = ANSWER_TOKENS,
) -> list[str]:
    """The greedy answers, each to a conversation of its own.

    `seen` (S, M, E) is `look`'s and `about` the row of it that each question is about; without them
    no prompt has a picture.
    """
    answers: list[str] = []
    for first in tqdm(range(0, len(questions), BATCH_SIZE), unit="batch", disable=None):
        here = slice(first, first + BATCH_SIZE)
        prompts = _prompts(speaker, questions[here], pictures=seen is not None)
        pictures = [()] * len(prompts) if seen is None else [(seen[row],) for row in about[here]]
        rows = [Row(*one, max_new_tokens) for one in zip(prompts, pictures, strict=True)]
        answers += answer_rows(speaker.model, speaker.tokenizer, rows)
    return answers


def _prompts(speaker: Speaker, questions: Sequence[str], *, pictures: bool) -> list[np.ndarray]:
    """The tokens of each question up to where the answer begins, each image mark M times."""
    asker = Asker(speaker.tokenizer)
    talks = [[said("user", question, pictures=int(pictures))] for question in questions]
    return [asker(talk, speaker.num_image_tokens) for talk in talks]


def is_right(answer: str, truth: str) -> bool:
    """Whether an answer is the right one, but for surrounding space and the case of letters."""
    return answer.strip().lower() == truth.strip().lower()


def accuracy(asked: Sequence[Asked], answers: Sequence[str]) -> float:
    """The share of right answers, 0 to 1."""
    return sum(is_right(a, q.truth) for q, a in zip(asked, answers, strict=True)) / len(asked)


def by_kind(asked: Sequence[Asked], answers: Sequence[str]) -> dict[str, float]:
    """The share of right answers for each kind of question that was asked, in the world's order."""
    groups: dict[str, list[bool]] = {kind: [] for kind in scenes.QUESTIONS}
    for question, text in zip(asked, answers, strict=True):
        groups[question.kind].append(is_right(text, question.truth))
    return {kind: sum(marks) / len(marks) for kind, marks in groups.items() if marks}


def is_exact_caption(text: str, sheet: scenes.Scene) -> bool:
    """Whether `text` names each digit with its ink and place once and no other, in any order."""
    named = [_named(piece) for piece in _pieces(text)]
    right = [(digit.ink, str(digit.value), digit.place) for digit in sheet.digits]
    return None not in named and sorted(map(str, named)) == sorted(map(str, right))


def marked_caption(text: str, sheet: scenes.Scene) -> list[tuple[str, bool]]:
    """The words of a caption in order, each with whether it is right.

    Each phrase is held against the digit with which it has most words in common.
    """
    marked: list[tuple[str, bool]] = []
    for part in re.split(r"(?<=,) | (?=and )|(?<= and) ", text.strip()):
        words = part.split()
        joint = [(word, True) for word in words[:1] if word == "and"]
        marked += joint + _marked_phrase(words[len(joint) :], sheet)
    return marked


def missing_phrases(text: str, sheet: scenes.Scene) -> list[str]:
    """The digits of `sheet`, in words, that a caption does not name rightly."""
    named = [_named(piece) for piece in _pieces(text)]
    return [scenes.phrase(d) for d in sheet.digits if (d.ink, str(d.value), d.place) not in named]


def _marked_phrase(words: list[str], sheet: scenes.Scene) -> list[tuple[str, bool]]:
    bare = [word.rstrip(",") for word in words]
    truths = [scenes.phrase(digit).split() for digit in sheet.digits]
    truth = max(truths, key=lambda one: sum(a == b for a, b in zip(bare, one, strict=False)))
    padded = [*truth, *[""] * len(words)]
    return [(w, b == right) for w, b, right in zip(words, bare, padded, strict=False)]


def _pieces(text: str) -> list[str]:
    return re.split(r", | and ", text.strip())


def _named(piece: str) -> tuple[str, str, str] | None:
    found = re.fullmatch(rf"an? (\w+) (\d) at the ({'|'.join(scenes.PLACES)})", piece)
    return (found[1], found[2], found[3]) if found else None
