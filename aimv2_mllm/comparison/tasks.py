"""What a comparison has to do, task by task: stages that runs have in common, towers to be resized,
runs, and their answers.

Owns the commands, by the verbs `run` and `evaluate`, and what tells that a task is done already.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from aimv2_mllm.answerers import digest
from aimv2_mllm.comparison.grid import Cell, Grid, Resized
from aimv2_mllm.recipe import Recipe, dump_recipe
from aimv2_mllm.recipe_stages import references

DONE, ANSWERS = "done.json", "evaluation"
PROGRAM = (sys.executable, "-m", "aimv2_mllm")


@dataclass(frozen=True)
class Task:
    """Commands, one after the other, whose words go to `folder`/log.txt; `after` are the tasks that
    must have ended well before, `asked` is a digest of what its result is asked, and `makes` a
    folder that must not be there before it."""

    name: str
    folder: Path
    commands: tuple[tuple[str, ...], ...]
    recipe: Recipe | None = None
    after: tuple[Path, ...] = ()
    asked: str = ""
    makes: Path | None = None

    @property
    def digest(self) -> str:
        """Changes with what the task does, and with the models in folders that it starts from."""
        words = [[word for word in command if word != sys.executable] for command in self.commands]
        recipe = dump_recipe(self.recipe) if self.recipe else ""
        said = [words, recipe, self.asked, *(_models(self.recipe) if self.recipe else ())]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def is_done(self) -> bool:
        """Whether it has ended well, with these very commands."""
        try:
            done = json.loads((self.folder / DONE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(done, dict) and done.get("digest") == self.digest


def _models(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The folders from outside that a recipe starts from, and what tells their contents."""
    for stage in recipe.stages.values():
        for source in references(stage).values():
            if "/" in source and Path(source).is_dir():
                yield source, digest(Path(source))


def answers_in(cell: Cell, asked: str) -> Path:
    """Where a run's answers to the questions with that digest are: a changed question is asked
    anew, and nothing is trained again for it."""
    return cell.folder / f"{ANSWERS}-{asked[:8]}"


def tasks_of(grid: Grid, launcher: Sequence[str], judge: Sequence[str], asked: str) -> list[Task]:
    """All tasks, seed by seed, in an order in which they can be done; `launcher` starts a run,
    `judge` are the words of `evaluate` behind the model, and `asked` is a digest of what is asked.
    """
    tasks, made = list[Task](), set[Path]()
    for seed, recipe in grid.shared.items():
        first: tuple[Path, ...] = ()
        if recipe is not None:
            folder = recipe.output.with_name(f"{recipe.output.name}-log")
            tasks.append(Task(f"shared, seed {seed}", folder, (_run(launcher, folder),), recipe))
            first = (folder,)
        for cell in (cell for cell in grid.cells if cell.seed == seed):
            after = first
            if cell.resized is not None:
                task = _resizing(cell.resized, first)
                after = (task.folder,)
                if task.folder not in made:
                    tasks.append(task)
                    made.add(task.folder)
            answers = str(answers_in(cell, asked))
            judged = (*PROGRAM, "evaluate", str(cell.recipe.output), *judge, "--out", answers)
            commands = (_run(launcher, cell.folder), judged)
            title = _title(grid, cell)
            tasks.append(Task(title, cell.folder, commands, cell.recipe, after, asked))
    return tasks


def _resizing(resized: Resized, after: tuple[Path, ...]) -> Task:
    source, folder, size = resized
    words = ("convert", source, str(folder), "--layout", "original", "--image-size", str(size))
    log = folder.with_name(f"{folder.name}-log")
    command = (*PROGRAM, *words)
    return Task(f"tower {folder.name}", log, (command,), after=after, makes=folder)


def _title(grid: Grid, cell: Cell) -> str:
    named = grid.named(cell.values)
    return f"{named}, seed {cell.seed}" if len(grid.seeds) > 1 else named


def _run(launcher: Sequence[str], folder: Path) -> tuple[str, ...]:
    return (*launcher, "run", str(folder / "recipe.yaml"))
