"""Which runs a comparison consists of: every combination of the values that vary, for every seed.

Owns what the runs of one seed have in common and is trained once, stage by stage; what no run needs
is not trained. Refuses, before anything is trained, every combination whose recipe has a mistake.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from aimv2_mllm.comparison.axes import IMAGE_SIZE, Axis, axis_of
from aimv2_mllm.errors import UsageError
from aimv2_mllm.folders import TALKING, result_of
from aimv2_mllm.recipe.data import HandwritingTalks
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.recipe.schema import Recipe, deciding, made_from
from aimv2_mllm.recipe.stages import REFERENCES

MOST_RUNS = 1000


class Resized(NamedTuple):
    """A tower whose positions are to be resized: from where, to where, for which side in pixels."""

    source: str
    folder: Path
    image_size: int


@dataclass(frozen=True)
class Common:
    """A stage that runs of one seed need and that is the same in all of them, as a run of its own
    that leaves `result` behind."""

    stage: str
    seed: int
    folder: Path
    recipe: Recipe
    result: Path


@dataclass(frozen=True)
class Cell:
    """A run of the comparison: a value for each axis, the seed, the stages of the recipe that its
    last one needs and that are not common, and the tower that it needs resized, if any."""

    values: tuple[str, ...]
    seed: int
    folder: Path
    recipe: Recipe
    resized: Resized | None = None


@dataclass(frozen=True)
class Grid:
    """All runs of a comparison, and the stages that are trained once for those of a seed, in an
    order in which they can be."""

    axes: tuple[Axis, ...]
    cells: tuple[Cell, ...]
    common: tuple[Common, ...]

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(cell.seed for cell in self.cells))

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
    sizes = [_image_size(axes, values) for values in combinations]
    cells, common, mistakes = list[Cell](), list[Common](), list[str]()
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
        _demand_different(combinations, recipes, sizes)
        made = dict[str, Path]()  # the results of common stages
        for name in _alike(recipes, sizes):
            folder = out / "shared" / f"{name}-seed-{seed}"
            part = _part(recipes[0], {name}, folder / "run", out, made)
            made[name] = result_of(part.output.absolute(), name)
            common.append(Common(name, seed, folder, part, made[name]))
        for values, recipe, size, name in zip(combinations, recipes, sizes, names, strict=True):
            folder = out / "cells" / f"{name}-seed-{seed}"
            rest = _part(recipe, _needed(recipe) - made.keys(), folder / "run", out, made)
            cells.append(Cell(values, seed, folder, *_with_resized_tower(rest, size, out)))
    return Grid(axes, tuple(cells), tuple(common))


def _demand_different(
    combinations: Sequence[tuple[str, ...]], recipes: Sequence[Recipe], sizes: Sequence[int | None]
) -> None:
    """UsageError for two combinations that are the same run, written in two ways."""
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


def models_of(stage: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a stage, in plain values, names models or other stages: each section, and its key."""
    for key in REFERENCES.get(stage["kind"], {}):
        *above, last = key.split(".")
        section: Any = stage
        for part in above:
            section = section[part]
        if section.get(last) is not None:
            yield section, last


def _named(stage: Mapping[str, Any]) -> set[str]:
    return {section[key] for section, key in models_of(stage)}


def _needed(recipe: Recipe) -> set[str]:
    """The names of the last stage and of those that it is made from."""
    last = list(recipe.stages)[-1]
    return {last, *made_from(recipe, last)}


def _alike(recipes: Sequence[Recipe], sizes: Sequence[int | None]) -> list[str]:
    """The stages that some run needs and that are the same in all, as is what they are made from;
    the last one never is."""
    every = [recipe.model_dump(mode="json")["stages"] for recipe in recipes]
    stages, needed, alike = every[0], set[str]().union(*map(_needed, recipes)), list[str]()
    resized = _with_tower(stages, needed) if any(sizes) else None
    for name, stage in list(stages.items())[:-1]:
        same = all(deciding(other[name]) == deciding(stage) for other in every)
        made_alike = _named(stage) & stages.keys() <= set(alike)
        if name in needed and name != resized and same and made_alike:
            alike.append(name)
    return alike


def _with_tower(stages: Mapping[str, Mapping[str, Any]], names: Set[str]) -> str | None:
    """The first of the stages with these names that talks and names its tower."""
    for name, stage in stages.items():
        if name in names and stage["kind"] in TALKING and stage.get("tower") is not None:
            return name
    return None


def _part(
    recipe: Recipe, names: Set[str], folder: Path, out: Path, made: Mapping[str, Path]
) -> Recipe:
    """The recipe of the stages with these names, run in `folder`, where those that are `made`
    elsewhere are named by their results; it keeps features for all runs in `out`."""
    plain = recipe.model_dump(mode="json")
    stages = {name: stage for name, stage in plain["stages"].items() if name in names}
    for stage in stages.values():
        for section, key in models_of(stage):
            section[key] = str(made.get(section[key], section[key]))
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
        and stage["data"]["image_aspect"] != "native"
        and all(source["kind"] != handwriting for source in stage["data"]["sources"])
    )


def _with_resized_tower(
    recipe: Recipe, size: int | None, out: Path
) -> tuple[Recipe, Resized | None]:
    """The recipe with its tower's positions resized, and the tower to be made for that."""
    if size is None:
        return recipe, None
    plain = recipe.model_dump(mode="json")
    named = _with_tower(plain["stages"], plain["stages"].keys())
    if named is None:
        raise UsageError(f"--vary {IMAGE_SIZE}: the last stage is not made from one with a tower")
    stage = plain["stages"][named]
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
