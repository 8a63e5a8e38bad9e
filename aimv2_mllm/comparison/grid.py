"""Which runs a comparison consists of: every combination of the values that vary, for every seed.

Owns what the runs of one seed have in common and is trained once.
Refuses, before anything is trained, every combination whose recipe has a mistake.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aimv2_mllm.comparison.axes import IMAGE_SIZE, Axis, axis_of
from aimv2_mllm.errors import UsageError
from aimv2_mllm.folders import TALKING
from aimv2_mllm.recipe import Recipe, deciding
from aimv2_mllm.recipe_data import HandwritingTalks
from aimv2_mllm.recipe_file import load_recipe
from aimv2_mllm.recipe_stages import REFERENCES

MOST_RUNS = 1000


class Resized(NamedTuple):
    """A tower whose positions are to be resized: from where, to where, for which side in pixels."""

    source: str
    folder: Path
    image_size: int


@dataclass(frozen=True)
class Cell:
    """A run of the comparison: a value for each axis, the seed, what is left of the recipe when the
    common stages are taken away, and the tower that it needs resized, if any."""

    values: tuple[str, ...]
    seed: int
    folder: Path
    recipe: Recipe
    resized: Resized | None = None


@dataclass(frozen=True)
class Grid:
    """All runs of a comparison; `shared` has for each seed the stages that are trained once, or
    None where the runs have no stage in common."""

    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]
    shared: Mapping[int, Recipe | None]

    @property
    def seeds(self) -> list[int]:
        return list(self.shared)

    def named(self, values: Sequence[str]) -> str:
        """The values of a run in words."""
        return ", ".join(axis.shown(v) for axis, v in zip(self.axes, values, strict=True))


def grid_of(
    file: str, overrides: Sequence[str], varied: Sequence[str], num_seeds: int, out: Path
) -> Grid:
    """The runs of the recipe `file`, overridden by words, where each of `varied`, KEY=A,B,…, has
    every value; their folders lie in `out`. UsageError for what varies nothing or is mistaken."""
    base = load_recipe(file, overrides)
    axes = tuple(axis_of(word, base) for word in varied)
    words = [axis.word for axis in axes]
    for word in words:
        if words.count(word) > 1:
            raise UsageError(f"--vary {word} is given twice: give its values in one")
    combinations = list(itertools.product(*(axis.values for axis in axes)))
    if len(combinations) * num_seeds > MOST_RUNS:
        raise UsageError(
            f"these are {len(combinations) * num_seeds:,} runs, {MOST_RUNS:,} are the most"
        )
    seeds = range(base.seed, base.seed + num_seeds)
    names = _folder_names([_name(axes, values) for values in combinations])
    if list(base.stages.values())[-1].kind not in TALKING:
        raise UsageError(
            f"{file}: ends with a {list(base.stages.values())[-1].kind} stage, whose result cannot "
            f"be asked; the last must be {' or '.join(TALKING)}"
        )
    cells, shared, mistakes = list[Cell](), dict[int, Recipe | None](), list[str]()
    for seed in seeds:
        recipes = []
        for values in combinations:
            given = [f"{a.key}={v}" for a, v in zip(axes, values, strict=True) if a.key]
            try:
                recipes.append(load_recipe(file, [*overrides, *given, f"seed={seed}"]))
            except UsageError as error:
                mistakes += [line for line in str(error).splitlines() if line not in mistakes]
        if mistakes:
            raise UsageError("\n".join(mistakes))
        _demand_different(axes, combinations, recipes)
        sizes = [_image_size(axes, values) for values in combinations]
        count = _num_common(recipes, sizes)
        common = out / "shared" / f"seed-{seed}"
        shared[seed] = _part(recipes[0], 0, count, common, out) if count else None
        for values, recipe, size, name in zip(combinations, recipes, sizes, names, strict=True):
            folder = out / "cells" / f"{name}-seed-{seed}"
            rest = _part(recipe, count, None, folder / "run", out, common)
            cells.append(Cell(values, seed, folder, *_with_resized_tower(rest, size, out)))
    return Grid(axes, tuple(cells), shared)


def _demand_different(
    axes: Sequence[Axis], combinations: Sequence[tuple[str, ...]], recipes: Sequence[Recipe]
) -> None:
    """UsageError for two combinations that are the same run, written in two ways."""
    sizes = [_image_size(axes, values) for values in combinations]
    plain = [(r.model_dump(mode="json"), s) for r, s in zip(recipes, sizes, strict=True)]
    for place, one in enumerate(plain):
        if (same := plain.index(one)) < place:
            both = " and ".join(", ".join(combinations[n]) for n in (same, place))
            raise UsageError(f"--vary: {both} are the same run")


def _image_size(axes: Sequence[Axis], values: Sequence[str]) -> int | None:
    sizes = [int(v) for axis, v in zip(axes, values, strict=True) if axis.word == IMAGE_SIZE]
    return sizes[0] if sizes else None


def _name(axes: Sequence[Axis], values: Sequence[str]) -> str:
    shown = "-".join(axis.shown(value) for axis, value in zip(axes, values, strict=True))
    return re.sub(r"[^A-Za-z0-9]+", "_", shown).strip("_")[:80] or "run"


def _folder_names(names: Sequence[str]) -> list[str]:
    """Names that differ, also where the letters left of two values are the same."""
    return [
        name if names.count(name) == 1 else f"{name}-{names[:place].count(name) + 1}"
        for place, name in enumerate(names)
    ]


def _num_common(recipes: Sequence[Recipe], sizes: Sequence[int | None]) -> int:
    """How many first stages are alike in all recipes; the last one is never common."""
    plain = [[_deciding(name, stage) for name, stage in r.stages.items()] for r in recipes]
    count = 0
    while count < min(map(len, plain)) - 1 and all(p[count] == plain[0][count] for p in plain):
        if any(sizes) and plain[0][count][1].get("tower") is not None:
            break
        count += 1
    return count


def _deciding(name: str, stage: Any) -> tuple[str, dict[str, Any]]:
    return name, deciding(stage.model_dump(mode="json"))


def _part(
    recipe: Recipe, first: int, end: int | None, folder: Path, out: Path, common: Path = Path()
) -> Recipe:
    """The recipe of stages `first` to `end`, run in `folder`, which takes the results of the stages
    before it from the folder `common`, and keeps features for all runs in `out`."""
    plain = recipe.model_dump(mode="json")
    names = list(plain["stages"])
    before = names[:first]
    stages = {name: plain["stages"][name] for name in names[first:end]}
    for stage in stages.values():
        for key in REFERENCES.get(stage["kind"], {}):
            *above, last = key.split(".")
            section = stage
            for part in above:
                section = section[part]
            if section.get(last) in before:
                section[last] = str(common.absolute() / section[last] / "model")
        if _keeps_features(stage):
            stage["data"]["features"] = {"folder": str((out / "features").absolute())}
    plain |= {"stages": stages, "output": str(folder), "evaluation": None}
    return Recipe.model_validate(plain)


def _keeps_features(stage: Mapping[str, Any]) -> bool:
    """Whether features of a frozen tower can be kept, and the recipe does not say how."""
    handwriting = HandwritingTalks.model_fields["kind"].default
    return (
        stage["kind"] in TALKING
        and not stage.get("tower_blocks")
        and stage["data"]["features"] is None
        and all(source["kind"] != handwriting for source in stage["data"]["sources"])
    )


def _with_resized_tower(
    recipe: Recipe, size: int | None, out: Path
) -> tuple[Recipe, Resized | None]:
    """The recipe with its tower's positions resized, and the tower to be made for that."""
    if size is None:
        return recipe, None
    plain = recipe.model_dump(mode="json")
    talking = [stage for stage in plain["stages"].values() if stage["kind"] in TALKING]
    stage = next(stage for stage in talking if stage.get("tower") is not None)
    source = stage["tower"]
    if source in plain["stages"]:
        raise UsageError(
            f"--vary {IMAGE_SIZE}: the tower {source} is trained in the runs themselves, which "
            f"differ before it; vary stages.{source}.encoder.image_size"
        )
    name = re.sub(r"[^A-Za-z0-9]+", "_", source).strip("_")[-60:]
    name += f"-{hashlib.sha256(source.encode()).hexdigest()[:8]}-{size}"
    resized = Resized(source, (out / "towers" / name).absolute(), size)
    stage["tower"] = str(resized.folder)
    return Recipe.model_validate(plain), resized
