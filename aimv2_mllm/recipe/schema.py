"""What a recipe may say: the schema of a run and its stages, typed, strict, printable.

`file` reads it. Refuses unknown keys, wrong types, values out of range, and references to
stages that do not come earlier. Whether a named folder or model exists is not looked up here: a
recipe means the same on every machine.
"""

import contextlib
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from aimv2_mllm.errors import nearest, show
from aimv2_mllm.recipe.stages import REFERENCES, Stage, references
from aimv2_mllm.recipe.types import Count, FolderName, Section, Seed

# Keys of a stage's sections that say how and not what is computed, when it is told, and when it is
# given up: a run may go on under others.
EXECUTION_KEYS = {
    "train": frozenset(
        {
            "micro_batch_size",
            "micro_batch_tokens",
            "device",
            "strategy",
            "activation_checkpointing",
            "compile",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "trackers",
        }
    ),
    "data": frozenset({"workers", "cache", "cache_gib", "features", "max_skipped"}),
}
# Those of them that counted once: fingerprints of then are known again (`stages.run_folder`).
ONCE_DECIDING = {"train": ("log_every",), "data": ("max_skipped",)}

Place = tuple[str, ...]  # the keys that lead to a value, outermost first
Mistake = tuple[Place, str]


class EvaluationConfig(Section):
    """How the results are judged: on held-out sheets of the embedded world, whatever they have
    learned from."""

    questions: Count = Field(default=1200, description="questions asked")
    sheets: Count = Field(default=8, description="pictures shown in the report")
    seed: Seed = Field(default=0, description="seed of the questions")


class Recipe(Section):
    """A whole run: its stages in the order in which they are run, and how the result is judged."""

    name: FolderName = Field(description="name of the run: letters, digits, - and _")
    seed: Seed = Field(default=0, description="seed of the weights and of the order of samples")
    output: Path = Field(
        default_factory=lambda data: Path("runs") / data["name"],
        strict=False,
        description="the run folder; runs/NAME by default",
    )
    stages: dict[FolderName, Annotated[Stage, Field(discriminator="kind")]] = Field(
        min_length=1, description="the stages by name, in the order in which they are run"
    )
    evaluation: EvaluationConfig | None = Field(
        default=None, description="how results are judged, by the embedded world; null: not at all"
    )

    @model_validator(mode="after")
    def _references_come_earlier(self) -> Self:
        mistakes = [*reference_mistakes({k: v.model_dump() for k, v in self.stages.items()})]
        if mistakes:
            lines = "; ".join(f"{'.'.join(place)} {text}" for place, text in mistakes)
            raise PydanticCustomError("reference", "{lines}", {"lines": lines})
        return self


def made_from(recipe: Recipe, name: str) -> list[str]:
    """The names of the stages that the one called `name` is made from, itself or by way of others,
    in their order."""
    needed = {name}
    for other, stage in reversed(recipe.stages.items()):  # what a stage names comes earlier
        if other in needed:
            needed |= {*references(stage).values()}
    return [other for other in recipe.stages if other in needed - {name}]


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML, every default written out; `load_recipe` reads it back equal."""
    plain = recipe.model_dump(mode="json")
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100))


def changed_keys(old: Recipe | Mapping[str, Any], new: Recipe) -> list[str]:
    """Return what differs, a line per key: `key: old -> new`, `key: added new`, `key: removed old`.

    A mapping that is a valid recipe counts with its defaults; another is compared as it stands.
    Where the run folder lies, how it is computed (`EXECUTION_KEYS`) and how the result is judged,
    which can be done anew, is no difference.
    """
    if not isinstance(old, Recipe):
        # not a recipe: written by another version
        with contextlib.suppress(ValidationError):
            old = Recipe.model_validate(old)
    plain = old.model_dump(mode="json") if isinstance(old, Recipe) else old
    before, after = (
        dict(_leaves(_deciding_of_all(recipe))) for recipe in (plain, new.model_dump(mode="json"))
    )
    lines = []
    for key, value in after.items():
        if key in before and before[key] != value:
            lines.append(f"{key}: {show(before[key])} -> {show(value)}")
        elif key not in before and value not in (None, {}):
            lines.append(f"{key}: added {show(value)}")
    gone = [key for key in before if key not in after and before[key] not in (None, {})]
    lines += [f"{key}: removed {show(before[key])}" for key in gone]
    was, now = list(plain.get("stages") or ()), list(new.stages)
    if was != now and set(was) == set(now):
        lines.append(f"stages: order {', '.join(was)} -> {', '.join(now)}")
    return lines


def deciding(stage: Mapping[str, Any]) -> dict[str, Any]:
    """What of a stage's plain values decides the numbers that come out of it.

    That is all but `EXECUTION_KEYS`; where it counts what a micro-batch is, its size too: a lit
    stage contrasts within it, and a native encoder sees pictures of one area in it.
    """
    encoder = stage.get("encoder")
    is_native = isinstance(encoder, Mapping) and encoder.get("native") is True
    kept = {"micro_batch_size"} if stage.get("kind") == "lit" or is_native else set()
    return {
        name: _without(section, EXECUTION_KEYS[name] - kept) if name in EXECUTION_KEYS else section
        for name, section in stage.items()
    }


def _without(plain: Any, keys: Set[str]) -> Any:
    if isinstance(plain, Mapping):
        return {key: _without(value, keys) for key, value in plain.items() if key not in keys}
    return [_without(value, keys) for value in plain] if isinstance(plain, list) else plain


def _deciding_of_all(recipe: Mapping[str, Any]) -> dict[str, Any]:
    stages = recipe.get("stages")
    if isinstance(stages, Mapping):
        stages = {n: deciding(s) if isinstance(s, Mapping) else s for n, s in stages.items()}
    return {**recipe, "output": None, "evaluation": None, "stages": stages}


def reference_mistakes(stages: Any) -> Iterator[Mistake]:
    """The stages that name others which do not come earlier, with what is wrong.

    On plain values of any type, so that it also judges a recipe with other mistakes.
    """
    earlier: dict[str, Any] = {}
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        kind = stage.get("kind") if isinstance(stage, dict) else None
        for key, wanted in REFERENCES.get(kind if isinstance(kind, str) else "", {}).items():
            said: Any = stage
            for part in key.split("."):
                said = said.get(part) if isinstance(said, dict) else None
            names = [other for other, its_kind in earlier.items() if its_kind in wanted]
            if not isinstance(said, str) or said in names:
                continue
            # a word is a stage, for an llm also a hub id; with a / it is a folder or a hub id
            weights = key not in ("llm", "tokenizer")
            if (not weights and said not in stages) or (weights and "/" in said):
                continue
            folder = "; a folder is written with a /, as in ./NAME" if weights else ""
            known = f"there {'are' if names else 'is'} {', '.join(names) or 'none'}"
            text = f"is {show(said)}, must be an earlier {' or '.join(wanted)} stage: {known}"
            yield ("stages", name, *key.split(".")), f"{text}{folder}{nearest(said, names)}"
        earlier[name] = kind


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield place, value
        return
    for key, below in value.items():
        yield from _leaves(below, f"{place}.{key}" if place else str(key))
