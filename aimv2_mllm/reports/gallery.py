"""Answers that a report shows: which of them, and as plain data for the templates.

Refuses to choose by anything but order, kind and picture.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from aimv2_mllm.data.handwriting import held_out, scenes
from aimv2_mllm.evaluation import answers
from aimv2_mllm.evaluation.summary import Findings
from aimv2_mllm.reports import charts
from aimv2_mllm.reports.charts import Picture

SHOWN = 6  # right answers shown, and wrong ones
RIGHT_AND_WRONG = ("Answered correctly", "Answered incorrectly")
NAMES = ("correctly", "incorrectly")  # of the files of their pictures
NOTE = "Not chosen: the first in the order asked, from different {} and of different kinds."


class Shown(NamedTuple):
    """An answer that may be shown; `about` is equal for those about the same picture."""

    about: Hashable
    kind: str
    question: str
    answer: str
    truth: str
    is_right: bool


def gallery(
    answered: Sequence[Shown],
    draw: Callable[[int, str], Picture],
    note: str,
    *,
    titles: tuple[str, str] = RIGHT_AND_WRONG,
) -> list[dict[str, Any]]:
    """The first right and the first wrong answers, of as many kinds as there are, as the templates
    of a report show them; empty where nothing was asked.

    `draw` makes the picture of an answer, by its number, under a name.
    """
    parts = []
    for title, name, is_right in zip(titles, NAMES, (True, False), strict=True):
        group = [n for n, one in enumerate(answered) if one.is_right == is_right]
        entries = [
            _entry(answered[number], draw(number, f"{name}-{row}.png"))
            for row, number in enumerate(_varied(answered, group), start=1)
        ]
        if entries:
            count = f"{len(group):,} of {len(answered):,} answers. {note}"
            parts.append({"title": title, "note": count, "entries": entries})
    return parts


def _varied(answered: Sequence[Shown], group: Sequence[int]) -> list[int]:
    """The first of new kind and new picture, then those of new picture, then all others."""
    chosen: list[int] = []
    kinds, pictures = set[str](), set[Hashable]()
    for demands_kind, demands_picture in ((True, True), (False, True), (False, False)):
        for number in group:
            one = answered[number]
            is_new = one.about not in pictures or not demands_picture
            if len(chosen) == SHOWN or number in chosen or not is_new:
                continue
            if one.kind not in kinds or not demands_kind:
                chosen.append(number)
                kinds.add(one.kind)
                pictures.add(one.about)
    return chosen


def _entry(one: Shown, picture: Picture) -> dict[str, Any]:
    return {
        "picture": picture,
        "kind": one.kind.replace("_", " "),
        "question": one.question,
        "answer": one.answer,
        "truth": one.truth,
        "right": one.is_right,
    }


def sheet_gallery(findings: Findings, seed: int) -> list[dict[str, Any]]:
    """The gallery of a run's answers about held-out sheets."""
    pairs = zip(findings.asked, findings.given, strict=True) if findings.given else ()
    answered = [
        Shown(one.sheet, one.kind, one.text, text, one.truth, answers.is_right(text, one.truth))
        for one, text in pairs
    ]

    def draw(number: int, name: str) -> Picture:
        sheet = held_out.held_out_sheet(seed, findings.asked[number].sheet)
        alt = f"A sheet with {scenes.caption(sheet)}"
        return Picture(name, alt, charts.picture(scenes.render(sheet, 112), 112))

    note = NOTE.format("sheets")
    if "text_accuracy" in findings.numbers:
        note += " The model read what is on the sheet in words; the picture is for you."
    return gallery(answered, draw, note)
