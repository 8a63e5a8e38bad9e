"""What the verb `evaluate` does: a model asked every question of a data set, judged, reported.

Owns its words on the terminal and what is put to the model; refuses to compute: see `evaluation`.
"""

import json
import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aimv2_mllm.data.asked import FIELDS, Asked, Question, load_asked, question_identity
from aimv2_mllm.errors import UsageError, nearest
from aimv2_mllm.evaluation.answerers import Ours, load_answerer
from aimv2_mllm.evaluation.asking import Answers, ask_all, demand_same
from aimv2_mllm.evaluation.controls import MAJORITY, SHOWN
from aimv2_mllm.evaluation.judging import Judged, judge, notes, summary
from aimv2_mllm.evaluation.metrics import METRICS
from aimv2_mllm.narration import warn
from aimv2_mllm.reports.evaluation_page import MORE, NOT_ALL, describe, pictures
from aimv2_mllm.reports.report import HTML, MARKDOWN, SUMMARY, fill, write_files
from aimv2_mllm.stages.job import versions
from aimv2_mllm.stages.run_folder import locked

CHOICES = "{question}\n{choices}\nAnswer with the letter of the right choice."
RESULTS = "results.jsonl"


def evaluate(args: Namespace) -> dict[str, Any]:
    """The numbers of `args.model` on the questions `args.data` by `args.metric`; they, an answer a
    line and a report are written to `args.out`, where answers go on where they stopped."""
    metric = METRICS[args.metric]
    columns = columns_of(args.column)
    asked = load_asked(
        args.data, root=args.root, columns=columns, split=args.split, limit=args.limit
    )
    demand_fit(args.data, args.metric, args.prompt, asked)
    prompts = [prompt_of(question, args.prompt) for question in asked.questions]
    model, folder = load_answerer(args.model), Path(args.out)
    identity = {
        "model": model.identity,
        "questions": question_identity(asked.questions, prompts),
        "max_new_tokens": args.max_new_tokens,
    }
    with locked(folder, "give another --out"):
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
        if isinstance(model, Ours) and (short := model.bot.prompter.num_short):
            warn(
                f"{short:,} questions, those of controls too, left fewer than --max-new-tokens "
                f"{args.max_new_tokens} of the model's {model.bot.limit} tokens: answers to them "
                "may be cut"
            )
        judged = judge(asked, answers, metric, controls=args.controls)
        numbers = {"model": args.model, "source": args.data, "metric": args.metric}
        numbers |= summary(judged, metric)
        numbers |= {
            "left_out": [*asked.left_out, *answers.left_out()],
            "not_asked": answers.not_asked(),
            "notes": notes(judged, metric),
            "prompt": args.prompt,
            "asked": identity,
            "command": _command(args),
            "versions": versions(),
        }
        write_files(folder, _files(numbers, judged, asked))
    return numbers


def _command(args: Namespace) -> str:
    """The command that gives the same numbers."""
    words = ["aimv2-mllm", "evaluate", args.model, args.data, "--metric", args.metric]
    for flag in ("prompt", "root", "limit", "batch_size", "max_new_tokens", "out"):
        value = getattr(args, flag)
        words += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
    words += [word for text in args.column or () for word in ("--column", text)]
    words += [] if args.controls else ["--no-controls"]
    return shlex.join([*words, "--split", args.split])


def _files(numbers: dict[str, Any], judged: Judged, asked: Asked) -> dict[str, bytes]:
    """The files of the report by name."""
    page = describe(numbers, judged, asked)
    texts = {
        RESULTS: "".join(_results(judged)),
        HTML: fill("evaluation.html.jinja", page),
        MARKDOWN: fill("evaluation.md.jinja", page),
        SUMMARY: json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    files = {name: text.encode() for name, text in texts.items()}
    return {picture.name: picture.png for picture in pictures(page)} | files


def prompt_of(question: Question, template: str | None) -> str:
    """What is put to the model: `template` with {question} and {choices} filled in; without one the
    question, and its choices by letter where it has any."""
    if template is None:
        template = CHOICES if question.choices else "{question}"
    lettered = [f"{chr(ord('A') + n)}. {text}" for n, text in enumerate(question.choices)]
    return template.replace("{choices}", "\n".join(lettered)).replace("{question}", question.text)


def columns_of(words: Sequence[str] | None) -> dict[str, str]:
    """What fields of the data are called, of words FIELD=NAME."""
    return dict(map(_column, words or ()))


def _column(text: str) -> tuple[str, str]:
    field, _, name = text.partition("=")
    if field not in FIELDS or not name:
        known = f"FIELD is one of {', '.join(FIELDS)}{nearest(field, FIELDS)}"
        raise UsageError(f"--column {text}: must be FIELD=NAME, where {known}")
    return field, name


def demand_fit(data: str, metric: str, prompt: str | None, asked: Asked) -> None:
    """UsageError for a question of `data` that the metric cannot judge, or a prompt without it."""
    for question in asked.questions:
        if why := METRICS[metric].unfit(question):
            raise UsageError(f"{data}: question {question.id} {why}")
    if prompt is not None and "{question}" not in prompt:
        raise UsageError(f"--prompt {prompt!r}: has no {{question}} where the question comes")


def _results(judged: Judged) -> list[str]:
    """A line of JSON for each question: what was asked, and each answer with its score."""
    lines = []
    for place, question in enumerate(judged.questions):
        line: dict[str, Any] = {
            "id": question.id,
            "type": question.kind,
            "picture": question.picture,
            "question": question.text,
            "answers": list(question.answers),
        }
        for name, texts in judged.given.items():
            line[name] = {"answer": texts[place], "score": judged.scores[name][place]}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


def as_table(numbers: dict[str, Any]) -> str:
    """The numbers for a terminal."""
    metric = METRICS[numbers["metric"]]
    more = "".join(
        f"; {len(numbers[key]):,} {what}, the first: {numbers[key][0]}"
        for key, what in NOT_ALL.items()
        if numbers[key]
    )
    lines = [
        f"model    {numbers['model']}",
        f"data     {numbers['source']}: {numbers['num_questions']:,} questions{more}",
        *(f"note     {note}" for note in numbers["notes"]),
        "",
        f"{f'{metric.title}, {metric.unit}':<34}{'mean':>9}   95 % interval",
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
    lines += [
        f"{text:<34}{100 * numbers[key]:>9.1f}" for key, text in MORE.items() if key in numbers
    ]
    return "\n".join(lines)
