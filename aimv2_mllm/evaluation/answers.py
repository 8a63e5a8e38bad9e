"""Questions about held-out sheets put to a model, many at once, and how its answers are scored.

Owns what counts as right; how it is asked is `chat`'s, as for whoever talks to it.
"""

import re
from collections.abc import Sequence

from torch import Tensor
from tqdm import tqdm

from aimv2_mllm.chat.chat import answer_all
from aimv2_mllm.chat.chatbot import Chatbot
from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.handwriting.held_out import HeldOut
from aimv2_mllm.evaluation.answerers import Asking, talk_of

BATCH_SIZE = 100
ANSWER_TOKENS = 16  # the longest right answer, "bottom right", has at most 13 (single bytes)
CAPTION_TOKENS = 160  # four digits in words are about 130 characters


def ask(
    bot: Chatbot,
    asked: Sequence[Asking],
    seen: dict[str, Tensor],
    *,
    max_new_tokens: int = ANSWER_TOKENS,
) -> list[str]:
    """The greedy answers, each to a conversation of its own; `seen` as in `answer_all`."""
    given: list[str] = []
    for first in tqdm(range(0, len(asked), BATCH_SIZE), unit="batch", disable=None):
        talks = [talk_of(*one) for one in asked[first : first + BATCH_SIZE]]
        given += answer_all(bot, talks, max_new_tokens=max_new_tokens, seen=seen)
    return given


def is_right(answer: str, truth: str) -> bool:
    """Whether an answer is the right one, but for surrounding space and the case of letters."""
    return answer.strip().lower() == truth.strip().lower()


def accuracy(asked: Sequence[HeldOut], answers: Sequence[str]) -> float:
    """The share of right answers, 0 to 1."""
    return sum(is_right(a, q.truth) for q, a in zip(asked, answers, strict=True)) / len(asked)


def by_kind(asked: Sequence[HeldOut], answers: Sequence[str]) -> dict[str, float]:
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
