"""The verbs that judge what models answer: evaluate, compare and lmms-eval."""

import argparse
import os
from dataclasses import fields
from typing import Any, TypeVar

from aimv2_mllm.narration import note, warn

Settings = TypeVar("Settings")


def _settings(kind: type[Settings], args: argparse.Namespace, **known: Any) -> Settings:
    """What the flags say, as a dataclass whose fields are named as they are; `known` are others."""
    named = [one.name for one in fields(kind) if one.name not in known]  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in named}, **known)


def evaluate(args: argparse.Namespace) -> None:
    """Print what a model's answers to the questions of a data set are worth; write a report."""
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    if not os.path.exists(args.model) or not os.path.exists(args.data):
        stay_offline_unless_reached()
    from aimv2_mllm.comparison.evaluate import as_table
    from aimv2_mllm.comparison.evaluate import evaluate as judge
    from aimv2_mllm.evaluation.questions import Questions, columns_of

    questions = _settings(Questions, args, columns=columns_of(args.column))
    print(as_table(judge(args.model, questions, args.out)))
    print(f"\nreport: {args.out / 'report.md'}")


def compare(args: argparse.Namespace) -> None:
    """Train variants of a recipe, print a table of what each is worth, and write a report."""
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    if args.data and not os.path.exists(args.data):
        stay_offline_unless_reached()
    from aimv2_mllm.comparison.compare import Runs
    from aimv2_mllm.comparison.compare import compare as measure
    from aimv2_mllm.comparison.page import as_table
    from aimv2_mllm.evaluation.questions import Questions, columns_of

    questions = _settings(Questions, args, columns=columns_of(args.column))
    numbers = measure(_settings(Runs, args), questions, args.out, note)
    print(as_table(numbers))
    for one in numbers["failed"]:
        warn(f"failed: {one['run']}: {one['why']}")
    print(f"\nreport: {args.out / 'report.md'}")
    if numbers["failed"]:
        raise SystemExit(1)


def lmms_eval(args: argparse.Namespace) -> None:
    """Print what lmms-eval makes of a model's answers, or the commands that would tell it."""
    from aimv2_mllm.lmms.command import Benchmarking, commands, run_benchmarks
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    if not args.print or not os.path.exists(args.model):
        stay_offline_unless_reached()
    how = _settings(Benchmarking, args)
    print(commands(how) if args.print else run_benchmarks(how, note).rstrip())
