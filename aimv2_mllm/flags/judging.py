"""The flags of the verbs that judge what models answer: evaluate, compare and lmms-eval."""

import argparse
from pathlib import Path
from typing import Any

from aimv2_mllm.flags.values import (
    MOST_DEVICES,
    MOST_NEW_TOKENS,
    MOST_PICTURES,
    PRECISIONS,
    add_recipe,
    whole,
)

METRICS = ("exact", "vqa", "choice", "yesno", "anls", "relaxed", "caption")


def add_evaluate(verbs: Any) -> None:
    """Add `evaluate` with its flags to the `verbs`."""
    words = verbs.add_parser("evaluate", help="ask a model the questions of a data set, and judge")
    _add_model(words)
    words.add_argument(
        "data",
        metavar="DATA",
        help="JSON lines with image, question and answers, a folder with questions.csv, or a "
        "dataset of the datasets library, by folder or hub id",
    )
    _add_out(words, "evaluation", "answers and report")
    _add_judging(words)


def add_compare(verbs: Any) -> None:
    """Add `compare` with its flags to the `verbs`."""
    words = verbs.add_parser(
        "compare", help="train variants of a recipe, towers or connectors, and judge them alike"
    )
    add_recipe(words)
    words.add_argument(
        "--vary",
        metavar="KEY=A,B",
        action="append",
        required=True,
        help="what varies, once for each: tower, connector, llm, image_size of the tower, or a key "
        "of the recipe such as stages.tune.lora.r",
    )
    words.add_argument(
        "--seeds", metavar="N", type=whole(1, 100), default=1, help="repeat every run so often (1)"
    )
    words.add_argument(
        "--jobs", metavar="N", type=whole(1, 256), default=1, help="runs at a time (1)"
    )
    words.add_argument(
        "--launcher",
        metavar="WORDS",
        help='what starts each run, such as "torchrun --nproc_per_node 8"',
    )
    words.add_argument(
        "--data",
        metavar="DATA",
        default="",
        help="the questions, as evaluate takes them (held-out sheets, where a recipe knows nothing "
        "but handwriting)",
    )
    _add_out(words, "comparison", "runs and report")
    _add_judging(words)


def add_lmms_eval(verbs: Any) -> None:
    """Add `lmms-eval` with its flags to the `verbs`."""
    words = verbs.add_parser(
        "lmms-eval", help="let lmms-eval ask a model and judge, in an environment of its own"
    )
    _add_model(words)
    words.add_argument(
        "tasks",
        metavar="TASKS",
        help="names of lmms-eval's tasks, as in mme,gqa, or a file of benchmarks such as "
        "recipes/benchmarks/paper.yaml",
    )
    _add_out(words, "lmms-eval", "answers and table")
    words.add_argument(
        "--environment",
        metavar="FOLDER",
        type=Path,
        default=".venv-lmms-eval",
        help="its virtual environment, made where there is none (.venv-lmms-eval)",
    )
    words.add_argument("--include-path", metavar="FOLDER", help="where more tasks are")
    counts = (
        ("--limit", MOST_PICTURES, None, "first so many questions of each task (all)"),
        ("--batch-size", 10_000, 8, "questions at once (8)"),
        ("--processes", MOST_DEVICES, 1, "how many ask together, one per device (1)"),
    )
    for name, high, default, text in counts:
        words.add_argument(name, metavar="N", type=whole(1, high), default=default, help=text)
    words.add_argument("--dtype", choices=PRECISIONS, help="precision: fp32, bf16 (the model's)")
    words.add_argument(
        "--simple",
        action="store_true",
        help="ask by text and pictures instead of messages, as tasks that compare likelihoods want",
    )
    words.add_argument(
        "--print", action="store_true", help="only print the commands that would be run"
    )


def _add_model(words: argparse.ArgumentParser) -> None:
    words.add_argument(
        "model",
        metavar="MODEL",
        help="a run folder, or the folder or hub id of an image-text model",
    )


def _add_out(words: argparse.ArgumentParser, default: str, what: str) -> None:
    words.add_argument(
        "--out", metavar="FOLDER", type=Path, default=default, help=f"{what} ({default})"
    )


def _add_judging(words: argparse.ArgumentParser) -> None:
    """What `evaluate` and `compare` are told about the questions."""
    words.add_argument(
        "--metric", choices=METRICS, default="exact", help=f"{', '.join(METRICS)} (exact)"
    )
    words.add_argument(
        "--prompt",
        metavar="TEXT",
        help="what is asked, with {question} and, where there are any, {choices} in it",
    )
    words.add_argument("--root", metavar="FOLDER", help="where pictures lie (the file's folder)")
    words.add_argument(
        "--column",
        metavar="FIELD=NAME",
        action="append",
        help="what image, question, answers, type, id or choices is called in the data, or, as "
        "answer_index, what has the number of the right choice, from 0; may be given several times",
    )
    words.add_argument("--split", metavar="NAME", default="test", help="of a dataset (test)")
    counts = (
        ("--limit", MOST_PICTURES, None, "first so many questions (all)"),
        ("--batch-size", 10_000, 8, "questions at once (8)"),
        ("--max-new-tokens", MOST_NEW_TOKENS, 64, "longest answer, tokens (64)"),
    )
    for name, high, default, text in counts:
        words.add_argument(name, metavar="N", type=whole(1, high), default=default, help=text)
    words.add_argument(
        "--no-controls",
        dest="controls",
        action="store_false",
        help="do not ask again without a picture and with another question's",
    )
