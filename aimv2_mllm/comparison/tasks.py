"""What a comparison has to do, task by task: stages that runs have in common, towers to be resized,
runs, and their answers.

Owns the commands, by the verbs `run` and `evaluate`, and what tells that a task is done already.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aimv2_mllm.comparison.evaluate import RESULTS
from aimv2_mllm.comparison.grid import Cell, Grid, Resized, models_of
from aimv2_mllm.evaluation.answerers import digest
from aimv2_mllm.folders import RECIPE_FILE, RESULT, result_of
from aimv2_mllm.recipe.schema import Recipe, dump_recipe

DONE, ANSWERS = "done.json", "evaluation"
PROGRAM = (sys.executable, "-m", "aimv2_mllm")


@dataclass(frozen=True)
class Task:
    """Commands, one after the other, whose words go to `folder`/log.txt; `sources` are the names of
    the models that they start from, `after` the tasks that must have ended well before, and `asked`
    a digest of what the result is asked. When it has ended well, there is what it `makes`, which
    is removed first where it has to be made `anew`."""

    name: str
    folder: Path
    commands: tuple[tuple[str, ...], ...]
    recipe: Recipe | None = None
    sources: tuple[str, ...] = ()
    after: tuple[Path, ...] = ()
    asked: str = ""
    makes: tuple[Path, ...] = ()
    anew: bool = False

    @property
    def digest(self) -> str:
        """Changes with what the task does, and with the models in folders that it starts from."""
        words = [[word for word in command if word != sys.executable] for command in self.commands]
        recipe = dump_recipe(self.recipe) if self.recipe else ""
        folders = [source for source in self.sources if "/" in source and Path(source).is_dir()]
        models = [(source, digest(Path(source))) for source in folders]
        inside = [
            result for source in folders for result in sorted(Path(source).glob(f"*/{RESULT}"))
        ]
        said = [words, recipe, self.asked, *models, *map(digest, inside)]  # of a run, its results
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def is_done(self) -> bool:
        """Whether it has ended well, with these very commands, and what it made is there."""
        try:
            done = json.loads((self.folder / DONE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        is_same = isinstance(done, dict) and done.get("digest") == self.digest
        return is_same and all(path.exists() for path in self.makes)


def undone(tasks: Sequence[Task]) -> list[Task]:
    """The tasks that are not done, and those that start from what one of them makes."""
    found = dict[Path, Task]()
    for task in tasks:
        if not task.is_done() or not found.keys().isdisjoint(task.after):
            found[task.folder] = task
    return list(found.values())


def answers_in(cell: Cell, asked: str) -> Path:
    """Where a run's answers to the questions with that digest are: a changed question is asked
    anew, and nothing is trained again for it."""
    return cell.folder / f"{ANSWERS}-{asked[:8]}"


def tasks_of(grid: Grid, launcher: Sequence[str], judge: Sequence[str], asked: str) -> list[Task]:
    """All tasks, in an order in which they can be done; `launcher` starts a run, `judge` are the
    words of `evaluate` behind the model, and `asked` is a digest of what is asked."""
    tasks = dict[Path, Task]()
    for seed in grid.seeds:
        for one in (one for one in grid.common if one.seed == seed):
            title = _title(grid, f"common stage {one.stage}", seed)
            commands = (_run(launcher, one.folder),)
            sources = _sources(one.recipe)
            tasks[one.folder] = Task(
                title, one.folder, commands, one.recipe, sources, makes=(one.result,)
            )
        for cell in (cell for cell in grid.cells if cell.seed == seed):
            if cell.resized is not None:
                task = _resizing(cell.resized)
                tasks[task.folder] = task
            answers, output = answers_in(cell, asked), cell.recipe.output
            judged = (*PROGRAM, "evaluate", str(output), *judge, "--out", str(answers))
            models = [result_of(output, name) for name in cell.recipe.stages]
            tasks[cell.folder] = Task(
                _title(grid, grid.named(cell.values), seed),
                cell.folder,
                (_run(launcher, cell.folder), judged),
                cell.recipe,
                _sources(cell.recipe),
                asked=asked,
                makes=(*models, answers / RESULTS),
            )
    made = {str(path): task.folder for task in tasks.values() for path in task.makes}
    return [
        replace(task, after=tuple(made[source] for source in task.sources if source in made))
        for task in tasks.values()
    ]


def _sources(recipe: Recipe) -> tuple[str, ...]:
    """The names of the models from outside that a recipe starts from."""
    stages = recipe.model_dump(mode="json")["stages"]
    named = [section[key] for one in stages.values() for section, key in models_of(one)]
    return tuple(name for name in named if name not in stages)


def _resizing(resized: Resized) -> Task:
    source, folder, size = resized
    words = ("convert", source, str(folder), "--layout", "original", "--image-size", str(size))
    log = folder.with_name(f"{folder.name}-log")
    command = (*PROGRAM, *words)
    return Task(
        f"tower {folder.name}", log, (command,), sources=(source,), makes=(folder,), anew=True
    )


def _title(grid: Grid, what: str, seed: int) -> str:
    return f"{what}, seed {seed}" if len(grid.seeds) > 1 else what


def _run(launcher: Sequence[str], folder: Path) -> tuple[str, ...]:
    return (*launcher, "run", str(folder / RECIPE_FILE))
