"""What the verb `evaluate` does: a model asked every question of a data set, judged, reported.

Owns its words on the terminal; refuses to compute: see `evaluation`.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from aimv2_mllm.data.questions.asked import question_identity
from aimv2_mllm.evaluation.answerers import Ours, load_answerer
from aimv2_mllm.evaluation.asking import Answers, ask_all, demand_same
from aimv2_mllm.evaluation.controls import MAJORITY, SHOWN
from aimv2_mllm.evaluation.judging import Judged, judge, notes, summary
from aimv2_mllm.evaluation.metrics import METRICS
from aimv2_mllm.evaluation.questions import Questions
from aimv2_mllm.folders import versions
from aimv2_mllm.formats import percent, percents
from aimv2_mllm.narration import warn
from aimv2_mllm.reports.evaluation_page import MORE, NOT_ALL, describe, pictures
from aimv2_mllm.reports.report import files_of, write_files
from aimv2_mllm.runs.run_folder import locked

RESULTS = "results.jsonl"


def evaluate(source: str, questions: Questions, folder: Path) -> dict[str, Any]:
    """The numbers of the model `source`, a folder or a hub id, on these questions; they, an answer
    a line and a report are written to `folder`, where answers go on where they stopped."""
    asked = questions.load()
    metric, prompts = METRICS[questions.metric], questions.prompts(asked)
    model = load_answerer(source)
    most, controls = questions.max_new_tokens, questions.controls
    identity = {
        "model": model.identity,
        "questions": question_identity(asked.questions, prompts),
        "max_new_tokens": most,
    }
    with locked(folder, "give another --out"):
        demand_same(folder, identity)
        answers = Answers(folder)
        ask_all(
            asked,
            prompts,
            lambda batch: model(batch, most),
            answers,
            controls=controls,
            batch=questions.batch_size,
        )
        if isinstance(model, Ours) and (short := model.bot.prompter.num_short):
            warn(
                f"{short:,} questions, those of controls too, left fewer than --max-new-tokens "
                f"{most} of the model's {model.bot.limit} tokens: answers to them may be cut"
            )
        judged = judge(asked, answers, metric, controls=controls)
        words = [source, questions.data, *questions.words(), "--out", str(folder)]
        numbers = {
            "model": source,
            "source": questions.data,
            "metric": questions.metric,
            **summary(judged, metric),
            "left_out": [*asked.left_out, *answers.left_out()],
            "not_asked": answers.not_asked(),
            "notes": notes(judged, metric),
            "prompt": questions.prompt,
            "asked": identity,
            "command": shlex.join(["aimv2-mllm", "evaluate", *words]),
            "versions": versions(),
        }
        page = describe(numbers, judged, asked)
        files = files_of("evaluation", page, numbers, pictures(page))
        write_files(folder, files | {RESULTS: "".join(_results(judged)).encode()})
    return numbers


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
        lines.append(f"{name:<34}{percent(told['score']):>9}   {percents(told['interval'])}")
    lines += [
        f"{text:<34}{percent(numbers[key]):>9}" for key, text in MORE.items() if key in numbers
    ]
    return "\n".join(lines)
