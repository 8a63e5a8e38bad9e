"""The verbs that judge what models answer: evaluate, compare and lmms-eval."""

import argparse
import os
from pathlib import Path

from aimv2_mllm.narration import note, warn


def evaluate(args: argparse.Namespace) -> None:
    """Print what a model's answers to the questions of a data set are worth; write a report."""
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    if not os.path.exists(args.model) or not os.path.exists(args.data):
        stay_offline_unless_reached()
    from aimv2_mllm.evaluation.evaluate import as_table
    from aimv2_mllm.evaluation.evaluate import evaluate as judge

    print(as_table(judge(args)))
    print(f"\nreport: {Path(args.out) / 'report.md'}")


def compare(args: argparse.Namespace) -> None:
    """Train variants of a recipe, print a table of what each is worth, and write a report."""
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    if args.data and not os.path.exists(args.data):
        stay_offline_unless_reached()
    from aimv2_mllm.comparison.compare import compare as measure
    from aimv2_mllm.comparison.page import as_table

    numbers = measure(args, note)
    print(as_table(numbers))
    for one in numbers["failed"]:
        warn(f"failed: {one['run']}: {one['why']}")
    print(f"\nreport: {Path(args.out) / 'report.md'}")
    if numbers["failed"]:
        raise SystemExit(1)


def lmms_eval(args: argparse.Namespace) -> None:
    """Print what lmms-eval makes of a model's answers, or the commands that would tell it."""
    from aimv2_mllm.lmms.command import run_benchmarks
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    if not args.print:
        stay_offline_unless_reached()
    print(run_benchmarks(args, note).rstrip())
