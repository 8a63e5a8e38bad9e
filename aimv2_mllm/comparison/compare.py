"""What the verb `compare` does: the runs of a grid, judged alike, in one table and two pictures."""

import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os.path import isdir  # pathlib's raises on a name that is too long
from pathlib import Path
from typing import Any

from aimv2_mllm.comparison.grid import Grid, grid_of
from aimv2_mllm.comparison.numbers import numbers_of
from aimv2_mllm.comparison.page import describe
from aimv2_mllm.comparison.running import do_all
from aimv2_mllm.comparison.speed import measure
from aimv2_mllm.comparison.tasks import PROGRAM, Task, tasks_of, undone
from aimv2_mllm.data.questions.asked import Asked, question_identity
from aimv2_mllm.data.questions.sources import HANDWRITING
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.evaluation.metrics import METRICS
from aimv2_mllm.evaluation.questions import Questions
from aimv2_mllm.folders import versions
from aimv2_mllm.model.hub import HUB_ID
from aimv2_mllm.narration import Narrate
from aimv2_mllm.reports.report import files_of, write_files
from aimv2_mllm.runs.run_folder import locked


@dataclass(frozen=True)
class Runs:
    """What is compared: the runs of the file `recipe`, changed by `overrides`, in every combination
    of the values that `vary` (KEY=A,B), for so many `seeds`; and how they are started: so many
    `jobs` at a time, by the words of a `launcher`."""

    recipe: str
    vary: Sequence[str]
    overrides: Sequence[str] = ()
    seeds: int = 1
    jobs: int = 1
    launcher: str | None = None

    def words(self) -> list[str]:
        """The words of the command line that say the same."""
        words = [self.recipe, *self.overrides]
        words += [word for text in self.vary for word in ("--vary", text)]
        words += ["--seeds", str(self.seeds), "--jobs", str(self.jobs)]
        return words + (["--launcher", self.launcher] if self.launcher else [])


def compare(runs: Runs, questions: Questions, out: Path, narrate: Narrate) -> dict[str, Any]:
    """The numbers of every combination; they and a report are written to `out`, where a comparison
    goes on where it stopped.

    Runs that fail are told and reported, the others go on. UsageError, before anything is trained,
    for combinations that are mistaken, questions that cannot be asked, and a folder in use.
    """
    grid = grid_of(runs.recipe, runs.overrides, runs.vary, runs.seeds, out)
    given = ["--data", questions.data] if questions.data else []
    questions = replace(questions, data=questions.data or _own_data(grid))
    asked = questions.load()
    if questions.controls and len({q.picture for q in asked.questions if q.picture}) < 2:
        raise UsageError(
            f"{questions.data}: all questions are about one picture, and the blind control shows "
            "another: give --no-controls"
        )
    digest = digest_of(asked, questions)
    launcher = (*shlex.split(runs.launcher), "-m", "aimv2_mllm") if runs.launcher else PROGRAM
    tasks = tasks_of(grid, launcher, [questions.data, *questions.words()], digest)
    _demand_folders(tasks)
    with ExitStack() as held:
        held.enter_context(locked(out))
        todo = len(undone(tasks))
        narrate(f"{len(grid.cells)} runs to compare; {todo} of {len(tasks)} tasks are to be done")
        failed = do_all(tasks, runs.jobs, narrate)
        if all(cell.folder in failed for cell in grid.cells):
            raise RunFailed(f"every run failed; the first: {next(iter(failed.values()))}")
        speed = measure([cell for cell in grid.cells if cell.folder not in failed], asked)
        are_shares = METRICS[questions.metric].is_share
        words = [*runs.words(), "--out", str(out), *given, *questions.words()]
        numbers = {
            "recipe": runs.recipe,
            "data": questions.data,
            "metric": questions.metric,
            "jobs": runs.jobs,
            **numbers_of(grid, failed, speed, digest, are_shares=are_shares),
            "command": shlex.join(["aimv2-mllm", "compare", *words]),
            "versions": {**versions(), "cores": str(os.cpu_count())},
        }
        page = describe(numbers)
        write_files(out, files_of("comparison", page, numbers, page["pictures"]))
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


def digest_of(asked: Asked, questions: Questions) -> str:
    """What tells these questions and their pictures, the right answers and how they are put from
    others; the metric does not count."""
    identity = question_identity(asked.questions, questions.prompts(asked))
    said: list[Any] = [identity, questions.max_new_tokens, asked.digest]
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
