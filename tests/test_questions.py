"""Settings of the verbs that judge: what flags say and what is given in Python are the same."""

from pathlib import Path

import pytest

from aimv2_mllm.comparison.compare import Runs
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation.questions import Questions, columns_of
from aimv2_mllm.flags.parser import build_parser
from aimv2_mllm.lmms.command import Benchmarking
from aimv2_mllm.verbs.judging import _settings

CHANGED = Questions(
    "q.jsonl", "vqa", "{question}?", "pictures", "val", 3, 2, 5, {"image": "file", "id": "n"}, False
)
# In this order, by which a comparison knows what it has done already.
WORDS = [
    "--metric", "vqa", "--prompt", "{question}?", "--root", "pictures", "--split", "val",
    "--limit", "3", "--batch-size", "2", "--max-new-tokens", "5", "--column", "image=file",
    "--column", "id=n", "--no-controls",
]  # fmt: skip


def questions(*words: str) -> Questions:
    args = build_parser().parse_args(words)
    return _settings(Questions, args, columns=columns_of(args.column))


def test_words_say_the_questions_again() -> None:
    assert CHANGED.words() == WORDS
    assert questions("evaluate", "model", "q.jsonl", *WORDS) == CHANGED
    varied = ("compare", "recipe.yaml", "--vary", "connector=mlp,linear")
    assert questions(*varied, "--data", "q.jsonl", *WORDS) == CHANGED
    assert questions(*varied) == Questions()
    assert Questions("q.jsonl").words() == [
        "--metric", "exact", "--split", "test", "--batch-size", "8", "--max-new-tokens", "64",
    ]  # fmt: skip


def test_a_metric_that_there_is_not_is_told() -> None:
    with pytest.raises(UsageError, match=r"--metric exakt: must be one of exact, .*mean exact"):
        Questions("q.jsonl", "exakt").load()


def test_words_say_the_runs_again() -> None:
    runs = Runs("recipe.yaml", ["a=1,2", "b=3"], ["seed=1"], 3, 2, "torchrun --nproc_per_node 8")
    args = build_parser().parse_args(["compare", *runs.words()])
    assert _settings(Runs, args) == runs


def test_what_is_not_said_is_the_same_in_python() -> None:
    parsed = build_parser().parse_args
    assert questions("evaluate", "model", "q.jsonl") == Questions("q.jsonl")
    args = parsed(["compare", "recipe.yaml", "--vary", "a=1,2"])
    assert _settings(Runs, args) == Runs("recipe.yaml", ["a=1,2"], [])
    assert _settings(Benchmarking, parsed(["lmms-eval", "m", "mme"])) == Benchmarking("m", "mme")
    assert args.out == Path("comparison")
