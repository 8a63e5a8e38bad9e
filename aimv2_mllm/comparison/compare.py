"""What the verb `compare` does: the runs of a grid, judged alike, in one table and two pictures."""

import hashlib
import json
import os
import shlex
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from os.path import isdir  # pathlib's raises on a name that is too long
from pathlib import Path
from typing import Any

from aimv2_mllm.comparison.grid import Grid, grid_of
from aimv2_mllm.comparison.numbers import numbers_of
from aimv2_mllm.comparison.page import describe, pictures
from aimv2_mllm.comparison.running import do_all
from aimv2_mllm.comparison.speed import measure
from aimv2_mllm.comparison.tasks import PROGRAM, Task, tasks_of, undone
from aimv2_mllm.data.asked import Asked, load_asked, question_identity
from aimv2_mllm.data.asked_sources import HANDWRITING
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.evaluation.evaluate import columns_of, demand_fit, prompt_of
from aimv2_mllm.evaluation.metrics import METRICS
from aimv2_mllm.model.hub import HUB_ID
from aimv2_mllm.narration import Narrate
from aimv2_mllm.reports.report import HTML, MARKDOWN, SUMMARY, fill, write_files
from aimv2_mllm.stages.job import versions
from aimv2_mllm.stages.run_folder import locked

# What of the flags `evaluate` is given too.
JUDGING = ("metric", "prompt", "root", "split", "limit", "batch_size", "max_new_tokens")


def compare(args: Namespace, narrate: Narrate) -> dict[str, Any]:
    """The numbers of every combination; they and a report are written to `args.out`, where a
    comparison goes on where it stopped.

    Runs that fail are told and reported, the others go on. UsageError, before anything is trained,
    for combinations that are mistaken, questions that cannot be asked, and a folder in use.
    """
    out = Path(args.out)
    grid = grid_of(args.recipe, args.overrides, args.vary, args.seeds, out)
    data = args.data or _own_data(grid)
    asked = load_asked(
        data, root=args.root, columns=columns_of(args.column), split=args.split, limit=args.limit
    )
    demand_fit(data, args.metric, args.prompt, asked)
    if args.controls and len({q.picture for q in asked.questions if q.picture}) < 2:
        raise UsageError(
            f"{data}: all questions are about one picture, and the blind control shows another: "
            "give --no-controls"
        )
    digest = digest_of(asked, args)
    launcher = (*shlex.split(args.launcher), "-m", "aimv2_mllm") if args.launcher else PROGRAM
    tasks = tasks_of(grid, launcher, [data, *_judge(args)], digest)
    _demand_folders(tasks)
    with ExitStack() as held:
        held.enter_context(locked(out))
        todo = len(undone(tasks))
        narrate(f"{len(grid.cells)} runs to compare; {todo} of {len(tasks)} tasks are to be done")
        failed = do_all(tasks, args.jobs, narrate)
        if all(cell.folder in failed for cell in grid.cells):
            raise RunFailed(f"every run failed; the first: {next(iter(failed.values()))}")
        speed = measure([cell for cell in grid.cells if cell.folder not in failed], asked)
        are_shares = METRICS[args.metric].is_share
        numbers = {
            "recipe": args.recipe,
            "data": data,
            "metric": args.metric,
            "jobs": args.jobs,
            **numbers_of(grid, failed, speed, digest, are_shares=are_shares),
            "command": _command(args),
            "versions": {**versions(), "cores": str(os.cpu_count())},
        }
        write_files(out, _files(numbers))
    return numbers


def _demand_folders(tasks: Sequence[Task]) -> None:
    """UsageError for a folder that a task starts from and that is not there, nor made by one."""
    made = {str(path) for task in tasks for path in task.makes}
    for task in tasks:
        for source in task.sources:
            is_path = "/" in source and source not in made and not HUB_ID.fullmatch(source)
            if is_path and not isdir(source):
                raise UsageError(
                    f"{source}: there is no such folder for '{task.name}' to start from; correct "
                    "the recipe or --vary"
                )


def digest_of(asked: Asked, args: Namespace) -> str:
    """What tells these questions and their pictures, the right answers and how they are put from
    others; the metric does not count."""
    prompts = [prompt_of(question, args.prompt) for question in asked.questions]
    identity = question_identity(asked.questions, prompts)
    said: list[Any] = [identity, args.max_new_tokens, asked.digest]
    said += [[q.answers, q.choices, q.kind] for q in asked.questions]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _own_data(grid: Grid) -> str:
    """The questions about the embedded world, for recipes that know nothing else."""
    kinds = {
        source.kind
        for cell in grid.cells
        for stage in cell.recipe.stages.values()
        for source in stage.data.sources
    }
    if kinds != {HANDWRITING}:
        raise UsageError(
            "--data DATA is missing: the questions that all runs are asked, as `evaluate` takes "
            "them; a recipe of handwriting alone is asked about held-out sheets"
        )
    return HANDWRITING


def _judge(args: Namespace) -> list[str]:
    """The words of `evaluate` for what the flags say."""
    words = []
    for flag in JUDGING:
        value = getattr(args, flag)
        words += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
    words += [word for text in args.column or () for word in ("--column", text)]
    return words + ([] if args.controls else ["--no-controls"])


def _command(args: Namespace) -> str:
    """The command that gives the same numbers."""
    words: list[str] = ["aimv2-mllm", "compare", args.recipe, *args.overrides]
    words += [word for text in args.vary for word in ("--vary", text)]
    words += ["--seeds", str(args.seeds), "--jobs", str(args.jobs), "--out", args.out]
    words += ["--data", args.data] if args.data else []
    words += ["--launcher", args.launcher] if args.launcher else []
    return shlex.join([*words, *_judge(args)])


def _files(numbers: dict[str, Any]) -> dict[str, bytes]:
    """The files of the report by name."""
    page = describe(numbers)
    texts = {
        HTML: fill("comparison.html.jinja", page),
        MARKDOWN: fill("comparison.md.jinja", page),
        SUMMARY: json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    files = {name: text.encode() for name, text in texts.items()}
    return {picture.name: picture.png for picture in pictures(page)} | files
