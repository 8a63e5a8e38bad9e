"""What a recipe may say: typed, strict, overridable by `key.sub=value` words, printable.

Owns the schema, its reading from YAML and its printing. Refuses, all mistakes of a file at once
and with their places: unknown keys, wrong types, values out of range, keys written twice,
references to stages that do not come earlier. Whether a named folder or model exists is not
looked up here: a recipe means the same on every machine.
"""

import contextlib
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from .errors import UsageError

MAX_BYTES = 256 * 1024  # a recipe is a page; parsing this much takes about a second
MAX_DEPTH = 32  # levels of nesting; the deepest key of the schema has five

Place = tuple[str, ...]  # the keys that lead to a value, outermost first
Mistake = tuple[Place, str]


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-3 (no dot, or no sign in the exponent) as text.
    is_number = isinstance(value, str) and re.fullmatch(
        r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value
    )
    return float(value) if is_number else value


def _switch(value: Any) -> Any:
    words = {"on": True, "yes": True, "off": False, "no": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_number)]
Switch = Annotated[bool, BeforeValidator(_switch)]
FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}$")]
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Count = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    # validate_default: a default can clash with a given value (warmup_steps, num_attention_heads).
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )


class TrainConfig(_Section):
    """How a stage is optimised: AdamW, linear warm-up, cosine decay.

    betas, eps and clip are by default those AIMv2 was pre-trained with.
    """

    steps: Count = Field(description="optimiser steps in all")
    batch_size: Count = Field(description="samples per optimiser step, over all devices")
    micro_batch_size: Count | None = Field(
        default=None, description="samples per forward pass, at most batch_size; null: all of them"
    )
    lr: Number = Field(gt=0, description="peak learning rate")
    final_lr: Number = Field(default=0.0, ge=0, description="learning rate after the last step")
    warmup_steps: int = Field(default=0, ge=0, description="steps of warm-up, fewer than steps")
    warmup_lr: Number = Field(default=0.0, ge=0, description="learning rate of the first step")
    part_lr: dict[Text, Annotated[Number, Field(gt=0)]] = Field(
        default={}, description="peak learning rates of single parts of the model, by part"
    )
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (
        Field(
            default=(0.9, 0.95), strict=False, description="AdamW's two decay rates, each in [0, 1)"
        )
    )
    eps: Number = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: Number = Field(default=0.0, ge=0, description="decay per step, times lr")
    clip: Number = Field(default=1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="arithmetic")
    log_every: Count = Field(default=10, description="steps from one line of metrics to the next")
    checkpoint_every: Count = Field(
        default=100, description="steps from one checkpoint to the next"
    )
    keep_checkpoints: Count = Field(default=2, description="newest checkpoints that are kept")

    @field_validator("micro_batch_size")
    @classmethod
    def _fits_the_batch(cls, value: int | None, info: ValidationInfo) -> int | None:
        batch = info.data.get("batch_size")  # absent when it is itself a mistake
        if value and batch and value > batch:
            raise ValueError(f"must be at most batch_size, which is {batch}")
        return value

    @field_validator("warmup_steps")
    @classmethod
    def _ends_before_the_last_step(cls, value: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps and value >= steps:
            raise ValueError(f"must be less than steps, which is {steps}")
        return value


class CaptionData(_Section):
    """Pictures with one caption each."""

    source: Literal["handwriting"] = Field(
        default="handwriting", description="where samples come from"
    )
    seed: Seed = Field(default=0, description="seed of the samples")


class ConversationData(CaptionData):
    """Conversations, each about one picture."""

    tasks: dict[Literal["copy", "describe", "list", "question"], Annotated[Number, Field(gt=0)]] = (
        Field(
            default={"describe": 1.0, "question": 1.0},
            min_length=1,
            description="weight of each task, relative",
        )
    )
    turns: int = Field(default=1, ge=1, le=8, description="questions per picture, 1 to 8")


class EncoderChoice(_Section):
    """The encoder to pre-train."""

    size: Literal[
        "aimv2_nano", "aimv2_base", "aimv2_large", "aimv2_huge", "aimv2_1b", "aimv2_3b"
    ] = Field(description="named size of the encoder")
    image_size: int = Field(
        ge=28, le=4096, multiple_of=14, description="side of the image, pixels, 28 to 4096"
    )
    native: Switch = Field(default=False, description="positions for any grid of patches")


class _Attention(_Section):
    hidden_size: Count = Field(description="width, channels")
    intermediate_size: Count = Field(description="width inside SwiGLU, channels")
    num_hidden_layers: Count = Field(description="depth, blocks")
    num_attention_heads: Count = Field(description="heads, a divisor of hidden_size")

    @field_validator("num_attention_heads")
    @classmethod
    def _divides_the_width(cls, value: int, info: ValidationInfo) -> int:
        width = info.data.get("hidden_size")
        if width and width % value:
            raise ValueError(f"must divide hidden_size, which is {width}")
        return value


class DecoderChoice(_Attention):
    """The decoder of pre-training; defaults as AIMv2 was trained."""

    hidden_size: Count = Field(default=1024, description="width, channels")
    intermediate_size: Count = Field(default=2816, description="width inside SwiGLU, channels")
    num_hidden_layers: Count = Field(default=12, description="depth, blocks")
    num_attention_heads: Count = Field(default=8, description="heads, a divisor of hidden_size")
    max_text_tokens: Count = Field(default=77, description="longest caption, tokens")


class LanguageChoice(_Attention):
    """A Llama, by its sizes."""

    num_key_value_heads: Count = Field(description="a divisor of num_attention_heads")
    max_position_embeddings: Count = Field(description="longest sequence, tokens")

    @field_validator("num_key_value_heads")
    @classmethod
    def _divides_the_heads(cls, value: int, info: ValidationInfo) -> int:
        heads = info.data.get("num_attention_heads")
        if heads and heads % value:
            raise ValueError(f"must divide num_attention_heads, which is {heads}")
        return value


class LoraChoice(_Section):
    """Which linear layers of the LLM get low-rank adapters, and how large these are."""

    r: Count = Field(default=8, description="rank of the adapters")
    alpha: Number = Field(default=16.0, gt=0, description="scale of the adapters, divided by r")
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="share dropped, in [0, 1)")
    targets: list[Text] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="names of the adapted linear layers",
    )


class PretrainStage(_Section):
    """Pre-trains an encoder on pictures and captions."""

    kind: Literal["pretrain"] = Field(default="pretrain", description="the kind of the stage")
    data: CaptionData = Field(default=CaptionData(), description="the samples")
    encoder: EncoderChoice = Field(description="the encoder to pre-train")
    decoder: DecoderChoice = Field(default=DecoderChoice(), description="used here only")
    tokenizer: Text = Field(description="the name tiny_llm, or a folder with a tokenizer")
    alpha: Number = Field(default=0.4, ge=0, description="weight of the image loss")
    train: TrainConfig = Field(description="how it is optimised")


class AlignStage(_Section):
    """Trains a connector from a frozen tower to a frozen LLM."""

    kind: Literal["align"] = Field(default="align", description="the kind of the stage")
    tower: Text = Field(description="an earlier pretrain stage, or a folder with an AIMv2 encoder")
    llm: Text = Field(description="tiny_llm, an earlier language stage, a folder or a hub id")
    connector: Literal["mlp"] = Field(default="mlp", description="named connector")
    data: ConversationData = Field(default=ConversationData(), description="the samples")
    train: TrainConfig = Field(description="how it is optimised")


class TuneStage(_Section):
    """Tunes the LLM of an aligned model with adapters."""

    kind: Literal["tune"] = Field(default="tune", description="the kind of the stage")
    start: Text = Field(description="an earlier align stage, whose result is tuned")
    lora: LoraChoice = Field(default=LoraChoice(), description="the adapters")
    data: ConversationData = Field(default=ConversationData(), description="the samples")
    train: TrainConfig = Field(description="how it is optimised")


class LanguageStage(_Section):
    """Trains a small LLM and its tokenizer on the text of the conversations."""

    kind: Literal["language"] = Field(default="language", description="the kind of the stage")
    model: LanguageChoice = Field(description="the LLM to train")
    vocab_size: Count = Field(description="size of the tokenizer's vocabulary, tokens")
    data: ConversationData = Field(default=ConversationData(), description="the samples")
    train: TrainConfig = Field(description="how it is optimised")


class EvaluationConfig(_Section):
    """How the result of the last stage is judged."""

    questions: Count = Field(default=1200, description="questions asked")
    sheets: Count = Field(default=8, description="pictures shown in the report")
    seed: Seed = Field(default=0, description="seed of the questions")


Stage = PretrainStage | AlignStage | TuneStage | LanguageStage
STAGES: dict[str, type[Stage]] = {
    "pretrain": PretrainStage,
    "align": AlignStage,
    "tune": TuneStage,
    "language": LanguageStage,
}
# kind of a stage -> its keys that name an earlier stage -> the kind which that stage must have
REFERENCES = {"align": {"tower": "pretrain", "llm": "language"}, "tune": {"start": "align"}}


class Recipe(_Section):
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
        default=None, description="how the result is judged"
    )

    @model_validator(mode="after")
    def _references_come_earlier(self) -> Self:
        mistakes = [*_reference_mistakes({k: v.model_dump() for k, v in self.stages.items()})]
        if mistakes:
            lines = "; ".join(f"{'.'.join(place)} {text}" for place, text in mistakes)
            raise PydanticCustomError("reference", "{lines}", {"lines": lines})
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a YAML file, overridden by words like `stages.tune.train.lr=1e-3`.

    Raises `UsageError` with one line per mistake, of the file and of the words together: where it
    stands, the value, what is allowed, and the nearest name for one that is not known.
    """
    file = Path(path)
    raw, lines, mistakes = _parse(_read(file), str(file))
    if not isinstance(raw, dict):
        what = "is empty" if raw is None else f"is {_show(raw)}"
        raise UsageError(f"{file}: {what}, a recipe is a mapping of keys such as name and stages")
    origins = {place: f"{file}:{line}" for place, line in lines.items()} | {(): str(file)}
    said = [_line(origins, *mistake) for mistake in mistakes]
    for word in overrides:
        origin = f"{file}, override {_show(word)}"
        place, more = _override(raw, word)
        said += [_line({(): origin}, *mistake) for mistake in more]
        if place:
            origins = {p: o for p, o in origins.items() if p[: len(place)] != place}
            origins[place] = origin
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        mistakes = [*_explained(error), *_reference_mistakes(raw.get("stages"))]
        raise UsageError("\n".join(said + [_line(origins, *m) for m in mistakes])) from None
    if said:
        raise UsageError("\n".join(said))
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML, every default written out; `load_recipe` reads it back equal."""
    plain = recipe.model_dump(mode="json")
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100))


def changed_keys(old: Recipe | Mapping[str, Any], new: Recipe) -> list[str]:
    """Return what differs, a line per key: `key: old -> new`, `key: added new`, `key: removed old`.

    A mapping that is a valid recipe counts with its defaults; another is compared as it stands.
    """
    if not isinstance(old, Recipe):
        # not a recipe: written by another version
        with contextlib.suppress(ValidationError):
            old = Recipe.model_validate(old)
    plain = old.model_dump(mode="json") if isinstance(old, Recipe) else old
    before, after = dict(_leaves(plain)), dict(_leaves(new.model_dump(mode="json")))
    lines = []
    for key, value in after.items():
        if key in before and before[key] != value:
            lines.append(f"{key}: {_show(before[key])} -> {_show(value)}")
        elif key not in before and value not in (None, {}):
            lines.append(f"{key}: added {_show(value)}")
    gone = [key for key in before if key not in after and before[key] not in (None, {})]
    lines += [f"{key}: removed {_show(before[key])}" for key in gone]
    was, now = list(plain.get("stages") or ()), list(new.stages)
    if was != now and set(was) == set(now):
        lines.append(f"stages: order {', '.join(was)} -> {', '.join(now)}")
    return lines


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
    return f"the recipes in {folder} are {', '.join(names) or 'none'}{_nearest(name, names)}"


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
        raise UsageError(f"{place}: {problem}: {_show(said)}") from None
    except yaml.reader.ReaderError as error:
        found = f"character {error.position} is {_show(chr(error.character))}"
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
        return (), [((), f"{_show(word)} is not an override: {example}")]
    try:
        value, _, mistakes = _parse(text, "its value")
    except UsageError as error:
        return place, [(place, str(error))]
    stages = raw.get("stages") if place[0] == "stages" and len(place) > 2 else None
    if isinstance(stages, dict) and place[1] not in stages:
        known = f"the stages are {', '.join(stages)}{_nearest(place[1], stages)}"
        return place, [(place[:2], f"there is no such stage; {known}")]
    branch = raw
    for depth, part in enumerate(place[:-1], start=1):
        if branch.get(part) is None:
            branch[part] = {}
        if not isinstance(branch[part], dict):
            said = f"is {_show(branch[part])}, it has no keys: give it whole"
            return place, [(place[:depth], said)]
        branch = branch[part]
    branch[place[-1]] = value
    return place, [((*place, *inner), said) for inner, said in mistakes]


def _reference_mistakes(stages: Any) -> Iterator[Mistake]:
    # On plain values of any type, so that it also judges a recipe with other mistakes.
    earlier: dict[str, Any] = {}
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        kind = stage.get("kind") if isinstance(stage, dict) else None
        for key, wanted in REFERENCES.get(kind if isinstance(kind, str) else "", {}).items():
            said = stage.get(key)
            names = [other for other, its_kind in earlier.items() if its_kind == wanted]
            if not isinstance(said, str) or said in names:
                continue
            # a word is a stage, for an llm also a hub id; a tower with a / is a folder
            if (key == "llm" and said not in stages) or (key == "tower" and "/" in said):
                continue
            folder = "; a folder is written with a /, as in ./NAME" if key == "tower" else ""
            known = f"there {'are' if names else 'is'} {', '.join(names) or 'none'}"
            text = f"is {_show(said)}, must be an earlier {wanted} stage: {known}"
            yield ("stages", name, key), f"{text}{folder}{_nearest(said, names)}"
        earlier[name] = kind


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


def _explained(error: ValidationError) -> Iterator[Mistake]:
    for mistake in error.errors(include_url=False):
        # said by _reference_mistakes, with their places; or said of the name that is missing
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
                yield (*place, "kind"), f"missing (the kind of the stage: {', '.join(STAGES)})"
            case "union_tag_invalid":
                tag = str(context["tag"])
                known = f"{', '.join(allowed)}{_nearest(tag, allowed)}"
                yield (*place, "kind"), f"is {_show(tag)}, must be one of {known}"
            case "extra_forbidden":
                names = list(owner.model_fields)
                known = f"{', '.join(names)}{_nearest(place[-1], names)}"
                yield place, f"unknown key; the keys here are {known}"
            case "literal_error":
                known = f"{', '.join(allowed)}{_nearest(str(value), allowed)}"
                yield place, f"is {_show(value)}, must be one of {known}{about}"
            case _:
                kind = mistake["type"].removesuffix("_type")
                own = re.sub(r"^(\w+ should|Value error, must)", "must", mistake["msg"])
                yield place, f"is {_show(value)}, {RULES.get(kind, own)}{about}"


def _located(location: Sequence[int | str]) -> tuple[Place, type[BaseModel], FieldInfo | None]:
    # -> the place without pydantic's marks, the class that holds its last key, that key's field
    parts = [str(part) for part in (location[:-1] if location[-1] == "[key]" else location)]
    owner: type[BaseModel] = Recipe
    keys = parts
    if parts[0] == "stages" and len(parts) > 2:
        owner = STAGES[parts.pop(2)]  # the tag of the union
        keys = parts[2:]
    field = owner.model_fields.get(keys[0])
    for key in keys[1:]:
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            break  # an entry of a dict or list, which is described with it
        owner = inner[0]
        field = owner.model_fields.get(key)
    return tuple(parts), owner, field


def _line(origins: Mapping[Place, str], place: Place, text: str) -> str:
    known = next(place[:n] for n in range(len(place), -1, -1) if place[:n] in origins)
    line = f"{origins[known]}: {'.'.join(place)}{': ' if place else ''}{text}"
    return line.replace("\n", "\\n")  # one line per mistake, whatever a key contains


def _nearest(name: str, names: Iterable[str]) -> str:
    by_lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield place, value
        return
    for key, below in value.items():
        yield from _leaves(below, f"{place}.{key}" if place else str(key))
