"""The answers of a model and of its controls, judged by a metric: every number of a summary.

Refuses to ask: see `asking`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from aimv2_mllm.data.questions.asked import Asked, Question
from aimv2_mllm.evaluation.asking import SEEN, Answers
from aimv2_mllm.evaluation.controls import MAJORITY, SHOWN, majority_answers
from aimv2_mllm.evaluation.intervals import bootstrap_interval, interval
from aimv2_mllm.evaluation.metrics import Metric

SHORT = "{question} Answer with a single word or phrase."


@dataclass(frozen=True)
class Judged:
    """The questions that count, and for each pass, the controls too, their answers and scores."""

    questions: list[Question]
    numbers: list[int]  # which of the data's questions they are
    given: dict[str, list[str]]
    scores: dict[str, list[float]]


def judge(asked: Asked, answers: Answers, metric: Metric, *, controls: bool) -> Judged:
    """The scores of every question whose picture could be decoded; 0 where the model could not be
    asked it."""
    kept = [
        number
        for number, question in enumerate(asked.questions)
        if question.id not in answers.unusable
    ]
    questions = [asked.questions[number] for number in kept]
    given = {
        name: [str(answers.given[name][question.id]) for question in questions]
        for name in (SEEN, *(SHOWN if controls else ()))
    }
    if controls and not metric.is_of_captions:
        kinds = [question.kind for question in questions]
        given[MAJORITY] = majority_answers(kinds, [question.answers for question in questions])
    scores = {}
    for name, texts in given.items():
        refused = answers.refused.get(name, {})
        scored = zip(questions, metric.score(questions, texts), strict=True)
        scores[name] = [0.0 if question.id in refused else score for question, score in scored]
    return Judged(questions, kept, given, scores)


def summary(judged: Judged, metric: Metric) -> dict[str, Any]:
    """Means with their 95 % intervals: of the answers, by type, of the controls, and of what seeing
    adds to the blind control."""
    whole, places = range(len(judged.questions)), dict[str, list[int]]()
    for place, question in enumerate(judged.questions):
        places.setdefault(question.kind, []).append(place)
    passes = {
        name: {
            **_told(judged, metric, name, whole),
            "by_type": {
                kind or "(none)": _told(judged, metric, name, here) for kind, here in places.items()
            },
        }
        for name in judged.scores
    }
    numbers: dict[str, Any] = {"num_questions": len(judged.questions), **passes.pop(SEEN)}
    if passes:
        pairs = zip(judged.scores[SEEN], judged.scores["blind"], strict=True)
        differences = [seen - blind for seen, blind in pairs]
        numbers["controls"] = passes
        numbers["seeing_adds"] = {
            "score": sum(differences) / len(differences),
            "interval": list(
                bootstrap_interval(differences, groups=[q.about for q in judged.questions])
            ),
        }
    return numbers


def notes(judged: Judged, metric: Metric) -> list[str]:
    """What must be known beside the numbers: that answers are too long for the metric."""
    given = median(len(text.split()) for text in judged.given[SEEN])
    right = median(max(len(a.split()) for a in q.answers) for q in judged.questions)
    if not metric.is_literal or given < 2 * right + 2:
        return []
    return [
        f"Answers have {given:g} words in the median, the right ones {right:g}, and for "
        f"{metric.title} a sentence around the right words is wrong: ask for short answers, as by "
        f"--prompt '{SHORT}'"
    ]


def _told(judged: Judged, metric: Metric, name: str, places: Sequence[int]) -> dict[str, Any]:
    """What is told of the answers of a pass to the questions at `places`."""
    questions = [judged.questions[place] for place in places]
    scores = [judged.scores[name][place] for place in places]
    ends = interval(scores, groups=[q.about for q in questions], are_shares=metric.is_share)
    return {
        "score": sum(scores) / len(scores),
        "interval": list(ends),
        "count": len(scores),
        **metric.more(questions, [judged.given[name][place] for place in places]),
    }
