"""Answers of a run that its report shows: which of them, and as plain data for the templates.

Refuses to choose by anything but order, kind and sheet.
"""

from typing import Any

from aimv2_mllm import charts
from aimv2_mllm.charts import Picture
from aimv2_mllm.data import scenes
from aimv2_mllm.evaluation import answers
from aimv2_mllm.evaluation.answers import Asked
from aimv2_mllm.evaluation.summary import Findings

SHOWN = 6  # right answers shown, and wrong ones


def gallery(findings: Findings, seed: int) -> list[dict[str, Any]]:
    """The first right and the first wrong answers, of as many kinds as there are, as the templates
    of the report show them; empty where nothing was asked."""
    if not findings.given:
        return []
    pairs = list(zip(findings.asked, findings.given, strict=True))
    right = [pair for pair in pairs if answers.is_right(pair[1], pair[0].truth)]
    wrong = [pair for pair in pairs if not answers.is_right(pair[1], pair[0].truth)]
    note = "Not chosen: the first in the order asked, from different sheets and of different kinds."
    if "text_accuracy" in findings.numbers:
        note += " The model read what is on the sheet in words; the picture is for you."
    parts = []
    for title, group in (("Answered rightly", right), ("Answered wrongly", wrong)):
        chosen = _varied(group)
        entries = [
            _entry(question, text, f"{title.split()[1]}-{row}.png", seed)
            for row, (question, text) in enumerate(chosen, start=1)
        ]
        if entries:
            count = f"{len(group):,} of {len(pairs):,} answers. {note}"
            parts.append({"title": title, "note": count, "entries": entries})
    return parts


def _varied(pairs: list[tuple[Asked, str]]) -> list[tuple[Asked, str]]:
    """The first pairs of new kind and new sheet, then those of new sheet, then all others."""
    chosen: list[tuple[Asked, str]] = []
    for demands_kind, demands_sheet in ((True, True), (False, True), (False, False)):
        for question, text in pairs:
            is_new_kind = question.kind not in [other.kind for other, _ in chosen]
            is_new_sheet = question.sheet not in [other.sheet for other, _ in chosen]
            wanted = (is_new_kind or not demands_kind) and (is_new_sheet or not demands_sheet)
            if len(chosen) < SHOWN and wanted and (question, text) not in chosen:
                chosen.append((question, text))
    return chosen


def _entry(question: Asked, text: str, name: str, seed: int) -> dict[str, Any]:
    sheet = answers.held_out_sheet(seed, question.sheet)
    alt = f"A sheet with {scenes.caption(sheet)}"
    return {
        "picture": Picture(name, alt, charts.picture(scenes.render(sheet, 112), 112)),
        "sheet": scenes.caption(sheet),
        "kind": question.kind.replace("_", " "),
        "question": question.text,
        "answer": text,
        "truth": question.truth,
        "right": answers.is_right(text, question.truth),
    }
