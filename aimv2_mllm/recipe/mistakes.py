"""How the mistakes in a recipe are told: where each stands, the value, what is allowed.

Owns the words for what the schema refuses; knows neither YAML nor the command line.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from aimv2_mllm.errors import nearest, show
from aimv2_mllm.recipe.connectors import CONNECTOR_SECTIONS
from aimv2_mllm.recipe.data import (
    SOURCE_SECTIONS,
    TALK_SECTIONS,
    CaptionData,
    CaptionTalks,
    ConversationData,
)
from aimv2_mllm.recipe.schema import Mistake, Place, Recipe
from aimv2_mllm.recipe.stages import SECTIONS

# keys whose values are of several kinds, which pydantic puts into a place as a mark of its own
TAGGED: dict[tuple[type[BaseModel], str], Mapping[str, type[BaseModel]]] = {
    (Recipe, "stages"): SECTIONS,
    (CaptionData, "sources"): SOURCE_SECTIONS,
    (ConversationData, "sources"): TALK_SECTIONS,
    (CaptionTalks, "pairs"): {k: v for k, v in SOURCE_SECTIONS.items() if k != "handwriting"},
}
# keys whose value is of several kinds
CHOICES: dict[str, Mapping[str, type[BaseModel]]] = {"connector": CONNECTOR_SECTIONS}
# what pydantic calls a mistake -> what we say, where its own words would puzzle
RULES = {
    "string_pattern_mismatch": "must be a name: letters, digits, - and _, not - first, at most 100",
    "string": "must be text: put it in quotes",
    "path": "must be text: put it in quotes",
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "dict": "must be a mapping",
    "model": "must be a mapping",
    "model_attributes": "must be a mapping",
    "too_short": "must not be empty",
}


def explained(error: ValidationError) -> Iterator[Mistake]:
    """What pydantic refused, in our words, each mistake at its place."""
    for mistake in error.errors(include_url=False):
        # said by reference_mistakes, with their places; or said of the name that is missing
        if mistake["type"] in ("reference", "default_factory_not_called"):
            continue
        place, owner, field = _located(mistake["loc"])
        about = f" ({field.description})" if field else ""
        value, context = mistake["input"], mistake.get("ctx", {})
        expected = context.get("expected", context.get("expected_tags", ""))
        allowed = re.findall(r"'([^']*)'", expected)
        match mistake["type"]:
            case "missing":
                yield place, f"missing{about}"
            case "union_tag_not_found":
                if place[-1] in CHOICES:
                    known = ", ".join(CHOICES[place[-1]])
                    yield (*place, "name"), f"missing (the {place[-1]}: {known})"
                    continue
                tagged = next(part for part in reversed(place) if (owner, part) in TAGGED)
                what = "stage" if owner is Recipe else "source"
                kinds = ", ".join(TAGGED[owner, tagged])
                yield (*place, "kind"), f"missing (the kind of the {what}: {kinds})"
            case "union_tag_invalid":
                tag = str(context["tag"])
                known = f"{', '.join(allowed)}{nearest(tag, allowed)}"
                key = "name" if place[-1] in CHOICES else "kind"
                yield (*place, key), f"is {show(tag)}, must be one of {known}"
            case "extra_forbidden":
                names = list(owner.model_fields)
                known = f"{', '.join(names)}{nearest(place[-1], names)}"
                yield place, f"unknown key; the keys here are {known}"
            case "literal_error":
                known = f"{', '.join(allowed)}{nearest(str(value), allowed)}"
                yield place, f"is {show(value)}, must be one of {known}{about}"
            case _:
                kind = mistake["type"].removesuffix("_type")
                own = re.sub(r"^(\w+ should|Value error, must)", "must", mistake["msg"])
                yield place, f"is {show(value)}, {RULES.get(kind, own)}{about}"


def _located(location: Sequence[int | str]) -> tuple[Place, type[BaseModel], FieldInfo | None]:
    # -> the place without pydantic's marks, the class that holds its last key, that key's field
    parts = [str(part) for part in (location[:-1] if location[-1] == "[key]" else location)]
    place: list[str] = []
    owner: type[BaseModel] = Recipe
    field: FieldInfo | None = None
    while parts:
        key = parts.pop(0)
        place.append(key)
        field = owner.model_fields.get(key)
        if (owner, key) in TAGGED:
            if key != "pairs" and parts:
                place.append(parts.pop(0))  # the entry's own name or number
            if not parts:
                break
            owner = TAGGED[owner, key][parts.pop(0)]
            continue
        if field is not None and key in CHOICES and parts:
            owner = CHOICES[key][parts.pop(0)]
            continue
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            break  # an entry of a dict or list, which is described with it
        owner = inner[0] if parts else owner
    return (*place, *parts), owner, field


def as_line(origins: Mapping[Place, str], place: Place, text: str) -> str:
    """A mistake in one line, which begins with the origin of the key that it stands at or below."""
    known = next(place[:n] for n in range(len(place), -1, -1) if place[:n] in origins)
    line = f"{origins[known]}: {'.'.join(place)}{': ' if place else ''}{text}"
    return line.replace("\n", "\\n")  # one line per mistake, whatever a key contains
