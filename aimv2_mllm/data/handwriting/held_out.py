"""The held-out part of the world of handwriting: its sheets, and what is asked about them.

Refuses to look at a training sheet.
"""

from typing import NamedTuple

from aimv2_mllm.data.handwriting import scenes


class HeldOut(NamedTuple):
    """A question: the index of its held-out sheet, its kind, its words, its one right answer."""

    sheet: int
    kind: str
    text: str
    truth: str


def held_out_questions(seed: int, count: int) -> list[HeldOut]:
    """`count` questions, one of each kind about each held-out sheet; the last sheet may get fewer.

    So there are equally many of each kind, give or take one.
    """
    kinds = list(scenes.QUESTIONS)
    asked = []
    for number in range(count):
        sheet, kind = number // len(kinds), kinds[number % len(kinds)]
        random = scenes.generator(seed, "asked", number)
        question = scenes.question(held_out_sheet(seed, sheet), random, kind)
        asked.append(HeldOut(sheet, *question))
    return asked


def held_out_sheet(seed: int, index: int) -> scenes.Scene:
    """The held-out sheet number `index`: its scans are in no training sheet."""
    return scenes.scene(seed, "heldout", index)


def in_words(seed: int, asked: HeldOut) -> str:
    """The question with its sheet described before it, the digits in any order, as in training."""
    phrases = [scenes.phrase(digit) for digit in held_out_sheet(seed, asked.sheet).digits]
    order = scenes.generator(seed, "told", asked.sheet).permutation(len(phrases))
    return f"On the sheet: {scenes.in_words([phrases[i] for i in order])}. {asked.text}"
