"""A recipe's YAML file, read strictly and overridden by `key.sub=value` words.

Owns what YAML means here; `mistakes` owns how mistakes are told. Refuses, all mistakes of a
file at once and with their places: unknown keys, wrong types, values out of range, keys written
twice, references to stages that do not come earlier.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import ValidationError

from aimv2_mllm.errors import UsageError, nearest, show
from aimv2_mllm.recipe.mistakes import as_line, explained
from aimv2_mllm.recipe.schema import Mistake, Place, Recipe, reference_mistakes

MAX_BYTES = 256 * 1024  # a recipe is a page; parsing this much takes about a second
MAX_DEPTH = 32  # levels of nesting; the deepest key of the schema has six


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file, overridden by words like `stages.tune.train.lr=1e-3`.

    Raises `UsageError` with one line per mistake, of the file and of the words together: where it
    stands, the value, what is allowed, and the nearest name for one that is not known.
    """
    file = Path(path)
    raw, lines, mistakes = _parse(_read(file), str(file))
    if not isinstance(raw, dict):
        what = "is empty" if raw is None else f"is {show(raw)}"
        raise UsageError(f"{file}: {what}, a recipe is a mapping of keys such as name and stages")
    origins = {place: f"{file}:{line}" for place, line in lines.items()} | {(): str(file)}
    said = [as_line(origins, *mistake) for mistake in mistakes]
    for word in overrides:
        origin = f"{file}, override {show(word)}"
        place, more = _override(raw, word)
        said += [as_line({(): origin}, *mistake) for mistake in more]
        if place:
            origins = {p: o for p, o in origins.items() if p[: len(place)] != place}
            origins[place] = origin
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        mistakes = [*explained(error), *reference_mistakes(raw.get("stages"))]
        raise UsageError("\n".join(said + [as_line(origins, *m) for m in mistakes])) from None
    if said:
        raise UsageError("\n".join(said))
    return recipe


class _Loader(yaml.SafeLoader):
    # Plain scalars mean one thing only: no octal 010, no base-60 1:30, no `no` for false, no dates.
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        refusal = None
        if isinstance(event, yaml.AliasEvent):
            refusal = "aliases (*name) are not allowed in a recipe: write the value out"
        elif getattr(event, "tag", None):
            refusal = "tags (!name) are not allowed in a recipe"
        elif self.depth >= MAX_DEPTH:
            refusal = f"nested deeper than {MAX_DEPTH} levels"
        if refusal:
            raise yaml.MarkedYAMLError(problem=refusal, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    # exactly YAML 1.1's decimals: what the dumper leaves unquoted as text must be text here too
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?",
        list("-+.0123456789"),
    ),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), _first
    )


def _read(file: Path) -> str:
    try:
        if file.is_dir():
            raise UsageError(f"{file}: is a folder; {_recipes_in(file, '')}")
        if not file.exists():
            raise UsageError(f"{file}: no such recipe; {_recipes_in(file.parent, file.name)}")
        if not file.is_file():
            raise UsageError(f"{file}: is not a file, a recipe is a YAML file")
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"{file}: is larger than {MAX_BYTES // 1024} KiB, too large for a recipe")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: is not UTF-8 text (byte {error.start} is not)") from None


def _recipes_in(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    return f"the recipes in {folder} are {', '.join(names) or 'none'}{nearest(name, names)}"


def _parse(text: str, source: str) -> tuple[Any, dict[Place, int], list[Mistake]]:
    # -> the plain value, the line of every key, and the keys that are no text or written twice
    lines: dict[Place, int] = {}
    mistakes: list[Mistake] = []
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        value = None if node is None else _plain(loader, node, (), lines, mistakes)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context
        if mark is None:
            raise UsageError(f"{source}: {problem}") from None
        said = (text.splitlines() or [""])[min(mark.line, len(text.splitlines()) - 1)].strip()
        place = f"{source}:{mark.line + 1}:{mark.column + 1}"
        raise UsageError(f"{place}: {problem}: {show(said)}") from None
    except yaml.reader.ReaderError as error:
        found = f"character {error.position} is {show(chr(error.character))}"
        raise UsageError(f"{source}: is not a text file that YAML allows: {found}") from None
    return value, lines, mistakes


def _plain(
    loader: _Loader, node: Any, place: Place, lines: dict[Place, int], mistakes: list[Mistake]
) -> Any:
    if isinstance(node, yaml.ScalarNode):
        try:
            return loader.construct_object(node)
        except ValueError:  # more digits than Python turns into a number
            return node.value
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*place, str(i))] = item.start_mark.line + 1
        return [
            _plain(loader, item, (*place, str(i)), lines, mistakes)
            for i, item in enumerate(node.value)
        ]
    mapping: dict[str, Any] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            said = key.value if isinstance(key, yaml.ScalarNode) else "?"
            lines[(*place, said)] = line
            mistakes.append(((*place, said), "the key is not text: put it in quotes"))
            continue
        here = (*place, key.value)
        if key.value in mapping:
            mistakes.append((here, f"is written twice, at lines {lines[here]} and {line}"))
            continue
        lines[here] = line
        mapping[key.value] = _plain(loader, value, here, lines, mistakes)
    return mapping


def _override(raw: dict[str, Any], word: str) -> tuple[Place, list[Mistake]]:
    # Writes the word's value into raw; the place it names, and what is wrong with the word.
    key, equals, text = word.partition("=")
    place = tuple(part.strip() for part in key.split("."))
    if not equals or not all(place):
        example = "an override is written key=value, for example stages.tune.train.lr=1e-3"
        return (), [((), f"{show(word)} is not an override: {example}")]
    try:
        value, _, mistakes = _parse(text, "its value")
    except UsageError as error:
        return place, [(place, str(error))]
    stages = raw.get("stages") if place[0] == "stages" and len(place) > 2 else None
    if isinstance(stages, dict) and place[1] not in stages:
        known = f"the stages are {', '.join(stages)}{nearest(place[1], stages)}"
        return place, [(place[:2], f"there is no such stage; {known}")]
    branch: Any = raw
    for depth, part in enumerate(place, start=1):
        if isinstance(branch, list) and re.fullmatch("[0-9]{1,4}", part):
            if int(part) >= len(branch):
                said = f"there is no such entry; the list has {len(branch)}, the first is 0"
                return place, [(place[:depth], said)]
            inner: Any = int(part)
        elif isinstance(branch, dict):
            inner = part
        else:
            said = f"is {show(branch)}, it has no keys: give it whole"
            return place, [(place[: depth - 1], said)]
        if depth == len(place):
            branch[inner] = value
        elif isinstance(branch, dict) and branch.get(inner) is None:
            branch[inner] = {}
        branch = branch[inner]
    return place, [((*place, *below), said) for below, said in mistakes]
