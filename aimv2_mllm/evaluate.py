"""What the verb `evaluate` does: a model asked every question of a data set, and judged.

Owns what is put together from answers, metric and controls; how it looks is `evaluation_page`'s.
"""

import json
import platform
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aimv2_mllm.answerers import load_answerer
from aimv2_mllm.data.asked import Asked, Question, load_asked
from aimv2_mllm.errors import UsageError, nearest
from aimv2_mllm.evaluation.asking import SEEN, Answers, ask_all, demand_same
from aimv2_mllm.evaluation.controls import MAJORITY, SHOWN, majority_answers
from aimv2_mllm.evaluation.intervals import bootstrap_interval, interval
from aimv2_mllm.evaluation.metrics import METRICS, Metric

CHOICES = "{question}\n{choices}\nAnswer with the letter of the right choice."
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Judged:
    """The questions that count, and for each pass, the controls too, their answers and scores."""

    questions: list[Question]
    numbers: list[int]  # which of the data's questions they are
    given: dict[str, list[str]]
    scores: dict[str, list[float]]


def evaluate(args: Namespace) -> dict[str, Any]:
    """The numbers of `args.model` on the questions `args.data` by `args.metric`; they, an answer a
    line and a report are written to `args.out`, where answers go on where they stopped."""
    metric = METRICS[args.metric]
    columns = dict(_column(text) for text in args.column or ())
    asked = load_asked(
        args.data, root=args.root, columns=columns, split=args.split, limit=args.limit
    )
    _demand_fit(args, metric, asked)
    prompts = [prompt_of(question, args.prompt) for question in asked.questions]
    model, folder = load_answerer(args.model), Path(args.out)
    identity = {
        "model": model.identity,
        "data": asked.digest,
        "questions": len(asked.questions),
        "prompt": args.prompt,
        "max_new_tokens": args.max_new_tokens,
    }
    demand_same(folder, identity)
    answers = Answers(folder)
    ask_all(
        asked,
        prompts,
        lambda batch: model(batch, args.max_new_tokens),
        answers,
        controls=args.controls,
        batch=args.batch_size,
    )
    judged = _judge(asked, answers, metric, controls=args.controls)
    numbers = {"model": args.model, "source": args.data, "metric": args.metric}
    numbers |= summary(judged, metric)
    numbers |= {"left_out": [*asked.left_out, *answers.unusable.values()], "asked": identity}
    packages = {name: version(name) for name in ("torch", "transformers", "aimv2-mllm")}
    numbers["versions"] = packages | {"python": platform.python_version()}
    _write_results(folder / RESULTS, judged)
    return numbers


def prompt_of(question: Question, template: str | None) -> str:
    """What is put to the model: `template` with {question} and {choices} filled in; without one the
    question, and its choices by letter where it has any."""
    if template is None:
        template = CHOICES if question.choices else "{question}"
    lettered = [f"{chr(ord('A') + n)}. {text}" for n, text in enumerate(question.choices)]
    return template.replace("{choices}", "\n".join(lettered)).replace("{question}", question.text)


def _column(text: str) -> tuple[str, str]:
    from aimv2_mllm.data.asked import FIELDS

    field, _, name = text.partition("=")
    if field not in FIELDS or not name:
        known = f"FIELD is one of {', '.join(FIELDS)}{nearest(field, FIELDS)}"
        raise UsageError(f"--column {text}: must be FIELD=NAME, where {known}")
    return field, name


def _demand_fit(args: Namespace, metric: Metric, asked: Asked) -> None:
    for question in asked.questions:
        if why := metric.unfit(question):
            raise UsageError(f"{args.data}: question {question.id} {why}")
    if args.prompt is not None and "{question}" not in args.prompt:
        raise UsageError(f"--prompt {args.prompt!r}: has no {{question}} where the question comes")


def _judge(asked: Asked, answers: Answers, metric: Metric, *, controls: bool) -> Judged:
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


def _write_results(path: Path, judged: Judged) -> None:
    from aimv2_mllm.files import write

    lines = []
    for place, question in enumerate(judged.questions):
        line: dict[str, Any] = {
            "id": question.id,
            "type": question.kind,
            "question": question.text,
            "answers": list(question.answers),
        }
        for name, texts in judged.given.items():
            line[name] = {"answer": texts[place], "score": judged.scores[name][place]}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write(path, lambda file: file.write_text("".join(lines), encoding="utf-8"))


def as_table(numbers: dict[str, Any]) -> str:
    """The numbers for a terminal."""
    metric = METRICS[numbers["metric"]]
    left_out = len(numbers["left_out"])
    more = f"; {left_out:,} left out, the first: {numbers['left_out'][0]}" if left_out else ""
    lines = [
        f"model    {numbers['model']}",
        f"data     {numbers['source']}: {numbers['num_questions']:,} questions{more}",
        "",
        f"{metric.title + ', %':<34}{'mean':>9}   95 % interval",
    ]
    rows = [("all", numbers)]
    if len(numbers["by_type"]) > 1:
        rows += [(f"  {kind}", told) for kind, told in numbers["by_type"].items()]
    titles = {**SHOWN, MAJORITY: "no model: the commonest answer"}
    rows += [(titles[name], told) for name, told in numbers.get("controls", {}).items()]
    if "seeing_adds" in numbers:
        rows.append(("what the right picture adds", numbers["seeing_adds"]))
    for name, told in rows:
        low, high = (100 * end for end in told["interval"])
        lines.append(f"{name:<34}{100 * told['score']:>9.1f}   {low:.1f} to {high:.1f}")
    for key in ("precision", "recall", "f1", "yes_share", "bleu_4", "rouge_l"):
        if key in numbers:
            lines.append(f"{key:<34}{100 * numbers[key]:>9.1f}")
    return "\n".join(lines)
