"""What the report of an evaluation says, as plain data for its two templates.

Owns every sentence and number of it; refuses to compute: see `evaluation.judging`.
"""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from aimv2_mllm.data.questions.asked import Asked, Question
from aimv2_mllm.evaluation.asking import SEEN
from aimv2_mllm.evaluation.controls import MAJORITY
from aimv2_mllm.evaluation.judging import Judged
from aimv2_mllm.evaluation.metrics import METRICS
from aimv2_mllm.formats import percent, percents
from aimv2_mllm.reports import charts
from aimv2_mllm.reports.charts import Picture
from aimv2_mllm.reports.gallery import NOTE, RIGHT_AND_WRONG, Shown, gallery

SIDE = 336  # pixels, the longer side of a picture shown
ENOUGH = 0.5  # an answer that is worth as much is shown as a right one
NEAR_AND_FAR = ("Nearer than most to what people wrote", "Further than most")
TRUTHS = 3  # right answers shown, the commonest first
NAMES = {
    SEEN: ("model", ""),
    "blind": ("blind", "The same model asked the same with another question's picture."),
    "text_only": ("text only", "The same model asked the same without any picture."),
    MAJORITY: ("majority", "No model: always the answer that is right most often in its type."),
}
# Lists of a summary that say which rows or questions have no answer, and what became of these.
NOT_ALL = {"left_out": "left out", "not_asked": "could not be asked and count as wrong"}
MORE = {
    "precision": "precision of yes",
    "recall": "recall of yes",
    "f1": "F1 of yes",
    "yes_share": "answers that say yes",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
}


def describe(numbers: Mapping[str, Any], judged: Judged, asked: Asked) -> dict[str, Any]:
    """Everything that the templates say of an evaluation, by the names they use."""
    versions = ", ".join(f"{name} {number}" for name, number in numbers["versions"].items())
    return {
        "title": f"{_last(numbers['model'])} on {_last(numbers['source'])}",
        "about": (
            f"{numbers['num_questions']:,} questions of {numbers['source']}, answered greedily by"
            f" {numbers['model']} and judged by {METRICS[numbers['metric']].title}."
        ),
        "headline": _headline(numbers),
        "notes": [
            *(_first(numbers[key], what) for key, what in NOT_ALL.items() if numbers[key]),
            *numbers["notes"],
        ],
        **_table(numbers),
        "gallery": _gallery(numbers, judged, asked),
        "prompt": numbers["prompt"] or "the question, and its choices by letter if any",
        "command": numbers["command"],
        "made_with": f"Intervals are of 95 %, over pictures with their questions. {versions}.",
    }


def pictures(page: Mapping[str, Any]) -> Iterable[Picture]:
    """The pictures that `report.md` shows, to lie as files beside it."""
    if page["bars"]:
        yield page["bars"]
    yield from (item["picture"] for part in page["gallery"] for item in part["entries"])


def _first(found: Sequence[str], what: str) -> str:
    return f"{len(found):,} {what}: {'; '.join(found[:3])}" + (" …" if len(found) > 3 else "")


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2] or name


def _headline(numbers: Mapping[str, Any]) -> list[dict[str, str]]:
    metric = METRICS[numbers["metric"]]
    title = f"{metric.title}, {metric.unit}"
    ends = f"95 % interval {percents(numbers['interval'])}"
    of_all = f"of {numbers['num_questions']:,} questions; {ends}"
    rows = [(title, percent(numbers["score"]), of_all)]
    for name, told in numbers.get("controls", {}).items():
        rows.append((NAMES[name][0], percent(told["score"]), NAMES[name][1]))
    if adds := numbers.get("seeing_adds"):
        ends = f"95 % interval {percents(adds['interval'])}"
        rows.append(("what the right picture adds", percent(adds["score"]), ends))
    rows += [(text, percent(numbers[key]), "") for key, text in MORE.items() if key in numbers]
    return [{"name": name, "value": value, "more": more} for name, value, more in rows]


def _table(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Model and controls by type of question, as a table and, where there are types, as bars."""
    told = {SEEN: numbers} | dict(numbers.get("controls", {}))
    named = [name for name in NAMES if name in told]
    kinds = list(numbers["by_type"])
    rows = [("all", numbers, [told[name]["score"] for name in named])]
    if len(kinds) > 1:
        rows += [
            (kind, numbers["by_type"][kind], [told[n]["by_type"][kind]["score"] for n in named])
            for kind in kinds
        ]
    series = {
        NAMES[name][0]: {kind: told[name]["by_type"][kind]["score"] for kind in kinds}
        for name in named
        if name != MAJORITY
    }
    further = [key for key in MORE if key in numbers]
    bars = None
    if len(kinds) > 1 and not METRICS[numbers["metric"]].is_of_captions:
        label = f"{METRICS[numbers['metric']].title}, %"
        light, dark = (
            charts.accuracy_bars(series, palette, label=label)
            for palette in (charts.LIGHT, charts.DARK)
        )
        bars = Picture("types.png", f"{label}, by type of question", light, dark)
    return {
        "bars": bars,
        "series": [*(NAMES[name][0] for name in named), *(MORE[key] for key in further)],
        "rows": [
            {
                "name": kind.replace("_", " "),
                "count": f"{one['count']:,}",
                "interval": percents(one["interval"]),
                "shares": [percent(score) for score in (*scores, *(one[key] for key in further))],
                "is_sum": kind == "all",
            }
            for kind, one, scores in rows
        ],
    }


def _gallery(numbers: Mapping[str, Any], judged: Judged, asked: Asked) -> list[dict[str, Any]]:
    scores, is_of_captions = judged.scores[SEEN], METRICS[numbers["metric"]].is_of_captions
    enough = sorted(scores)[len(scores) // 2] if is_of_captions else ENOUGH
    answered = [
        Shown(
            question.picture,
            question.kind if score in (0, 1) else f"{question.kind} {percent(score)}".strip(),
            question.text,
            text,
            _truth(question),
            score >= enough,
        )
        for question, text, score in zip(judged.questions, judged.given[SEEN], scores, strict=True)
    ]

    def draw(number: int, name: str) -> Picture:
        question = judged.questions[number]
        if not question.picture:
            return Picture(name, "No picture", _png(Image.new("RGB", (SIDE, SIDE), "#9db0c4")))
        shown = asked.open(judged.numbers[number])
        shown.thumbnail((SIDE, SIDE))
        return Picture(name, f"The picture of question {question.id}", _png(shown))

    titles = NEAR_AND_FAR if is_of_captions else RIGHT_AND_WRONG
    return gallery(answered, draw, NOTE.format("pictures"), titles=titles)


def _truth(question: Question) -> str:
    return " / ".join(text for text, _ in Counter(question.answers).most_common(TRUTHS))


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()
