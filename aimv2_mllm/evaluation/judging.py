"""The answers of a model and of its controls, judged by a metric: every number of a summary.

Refuses to ask: see `asking`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aimv2_mllm.data.asked import Asked, Question
from aimv2_mllm.evaluation.asking import SEEN, Answers
from aimv2_mllm.evaluation.controls import MAJORITY, SHOWN, majority_answers
from aimv2_mllm.evaluation.intervals import bootstrap_interval, interval
from aimv2_mllm.evaluation.metrics import Metric


@dataclass(frozen=True)
class Judged:
    """The questions that count, and for each pass, the controls too, their answers and scores."""

    questions: list[Question]
    numbers: list[int]  # which of the data's questions they are
    given: dict[str, list[str]]
    scores: dict[str, list[float]]


def judge(asked: Asked, answers: Answers, metric: Metric, *, controls: bool) -> Judged:
    """The scores of every question whose picture could be decoded."""
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
    scores = {name: metric.score(questions, texts) for name, texts in given.items()}
    return Judged(questions, kept, given, scores)


def summary(judged: Judged, metric: Metric) -> dict[str, Any]:
    """Means with their 95 % intervals: of the answers, by type, of the controls, and of what seeing
    adds to the blind control."""
    kinds = list(dict.fromkeys(question.kind for question in judged.questions))
    passes = {
        name: {
            **_mean(scores),
            "by_type": {
                kind or "(none)": _mean(
                    [s for s, q in zip(scores, judged.questions, strict=True) if q.kind == kind]
                )
                for kind in kinds
            },
            **metric.more(judged.questions, judged.given[name]),
        }
        for name, scores in judged.scores.items()
    }
    numbers: dict[str, Any] = {"num_questions": len(judged.questions), **passes.pop(SEEN)}
    if passes:
        pairs = zip(judged.scores[SEEN], judged.scores["blind"], strict=True)
        differences = [seen - blind for seen, blind in pairs]
        numbers["controls"] = passes
        numbers["seeing_adds"] = {
            "score": sum(differences) / len(differences),
            "interval": list(bootstrap_interval(differences)),
        }
    return numbers


def _mean(scores: Sequence[float]) -> dict[str, Any]:
    return {
        "score": sum(scores) / len(scores),
        "interval": list(interval(scores)),
        "count": len(scores),
    }
