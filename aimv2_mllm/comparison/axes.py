"""What of a recipe varies, as `--vary` says it, and how its values are told apart."""

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from aimv2_mllm.errors import UsageError, nearest
from aimv2_mllm.folders import TALKING
from aimv2_mllm.recipe.schema import Recipe

SHORT = ("tower", "connector", "llm")  # keys of the first stage that has them
IMAGE_SIZE = "image_size"  # of the tower, whose positions are resized to it
OWN = ("name", "seed", "output", "evaluation")  # what each run is given here


@dataclass(frozen=True)
class Axis:
    """What varies: the word for it, the recipe's key ("" for the tower's image size), its values
    as they are typed."""

    word: str
    key: str
    values: tuple[str, ...]

    def shown(self, value: str) -> str:
        """A value without the marks of YAML: `{name: resampler, num_queries: 8}` is `resampler 8`,
        a folder is its last two names, or all where another's are the same."""
        short = [_short(one) for one in self.values]
        return value if short.count(_short(value)) > 1 else _short(value)


def _short(value: str) -> str:
    plain = yaml.safe_load(value)
    if isinstance(plain, dict):
        rest = [v if len(plain) == 2 else f"{k} {v}" for k, v in plain.items() if k != "name"]
        return " ".join(map(str, [plain.get("name", ""), *rest])).strip()
    return "/".join(value.rstrip("/").split("/")[-2:])


def axis_of(word: str, base: Recipe) -> Axis:
    """What varies by KEY=A,B,… in the recipe; UsageError for what cannot."""
    key, equals, text = word.partition("=")
    values = tuple(_split(text))
    if not equals or not key or not values or not all(values):
        example = "--vary tower=image_only,both"
        raise UsageError(f"--vary {word}: is written KEY=VALUE,VALUE, for example {example}")
    try:
        for value in values:
            yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"--vary {word}: is no value as a recipe has it; see to quotes") from None
    if len(set(values)) < len(values):
        raise UsageError(f"--vary {word}: has a value twice")
    if key.partition(".")[0] in OWN:
        raise UsageError(f"--vary {word}: {key} cannot vary; --seeds N repeats every run")
    if key == IMAGE_SIZE:
        for value in values:
            if not value.isdecimal() or not int(value):
                raise UsageError(f"--vary {word}: {value} is no number of pixels")
        _stage_with("tower", base, word)
        return Axis(key, "", values)
    if key in SHORT:
        return Axis(key, f"stages.{_stage_with(key, base, word)}.{key}", values)
    if "." not in key:
        known = [*SHORT, IMAGE_SIZE]
        raise UsageError(
            f"--vary {word}: {key} is none of {', '.join(known)}{nearest(key, known)}, and no key "
            "of the recipe such as stages.tune.lora.r"
        )
    return Axis(key.removeprefix("stages."), key, values)


def _split(text: str) -> Iterator[str]:
    """The values between commas; those inside brackets and quotes belong to a value."""
    depth, quote, value = 0, "", ""
    for letter in text:
        if letter == quote:
            quote = ""
        elif letter in "'\"" and not quote:
            quote = letter
        depth += 0 if quote else (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0 and not quote:
            yield value.strip()
            value = ""
        else:
            value += letter
    yield value.strip()


def _stage_with(key: str, base: Recipe, word: str) -> str:
    """The name of the first stage that talks and has the key: a connector where it has a tower, for
    it has the default one if none is said."""
    has = "tower" if key == "connector" else key
    for name, stage in base.stages.items():
        if stage.kind in TALKING and getattr(stage, has, None) is not None:
            return name
    raise UsageError(f"--vary {word}: no align or tune stage of the recipe has a {key}")
