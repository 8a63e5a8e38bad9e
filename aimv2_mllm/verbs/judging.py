"""The verbs that show what was learned: probe, dream, evaluate, compare and lmms-eval."""

import argparse
import os
from pathlib import Path

from aimv2_mllm.errors import UsageError
from aimv2_mllm.parser import PROGRAM
from aimv2_mllm.verbs.talking import demand_handwriting
from aimv2_mllm.verbs.telling import note


def probe(args: argparse.Namespace) -> None:
    """Print what frozen features tell of labelled pictures; write it as JSON, and a picture."""
    from aimv2_mllm import files

    if (args.kind == "zeroshot") != (args.templates is not None):
        raise UsageError("--templates FILE belongs to --kind zeroshot, and is needed there")
    if args.kind == "zeroshot" and (args.pca or args.image_size):
        raise UsageError("--pca and --image-size are not for --kind zeroshot")
    if args.out:
        files.demand_place(Path(args.out), "results.json")
    if args.pca:
        files.demand_picture_place(Path(args.pca))
    from aimv2_mllm.seeing import probe_tower, probe_zero_shot

    (probe_zero_shot if args.kind == "zeroshot" else probe_tower)(args)


def dream(args: argparse.Namespace) -> None:
    """Let a pre-training decoder paint and caption a picture; print the caption and the file."""
    from aimv2_mllm import files

    if (args.image is None) == (not args.sheet):
        raise UsageError("dream needs one picture: --image FILE, or --sheet for a held-out sheet")
    files.demand_picture_place(Path(args.out))
    from aimv2_mllm.data.images import open_image

    if args.sheet:
        demand_handwriting(Path(args.model))
    picture = None if args.sheet else open_image(args.image)
    from aimv2_mllm.seeing import dream as dream_of

    dream_of(args, picture)


def evaluate(args: argparse.Namespace) -> None:
    """Print what a model's answers to the questions of a data set are worth; write a report."""
    from aimv2_mllm.model.hub import stay_offline_unless_reached

    if not os.path.exists(args.model) or not os.path.exists(args.data):
        stay_offline_unless_reached()
    from aimv2_mllm.evaluate import as_table
    from aimv2_mllm.evaluate import evaluate as judge

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
        note(f"{PROGRAM}: failed: {one['run']}: {one['why']}")
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
