"""What the values of flags may be: the numbers and names that several verbs take.

Refuses digits of other scripts, underscores in numbers, and what is out of range.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aimv2_mllm.model.sampling import RANGES

SMALLEST_SHEET, LARGEST_SHEET = 28, 4096  # pixels, the sides of images that a recipe allows
MOST_NEW_TOKENS, MOST_PICTURES = 100_000, 10**9
MOST_DEVICES = 100_000
PRECISIONS = ("fp32", "bf16")


def whole(low: int, high: int) -> Callable[[str], int]:
    """What reads a whole number, `low` to `high`."""

    def parse(text: str) -> int:
        # Not int(text), which takes digits of other scripts, and underscores.
        if text.isascii() and text.isdecimal() and len(text) < 20 and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"is {text}, must be a whole number, {low} to {high}")

    return parse


def setting(flag: str, kind: type[int] | type[float]) -> Callable[[str], Any]:
    """What reads the flag of one of the `RANGES` of sampling."""
    name = flag.removeprefix("--").replace("-", "_")
    allowed = RANGES[name]

    def parse(text: str) -> Any:
        value: float | None = None
        if text.isascii() and "_" not in text:  # which Python's own numbers may have
            with suppress(ValueError):
                value = kind(text)
        if value is None or not allowed.allows(value):
            raise argparse.ArgumentTypeError(f"is {text}, must be {allowed.words}")
        return value

    return parse


def add_recipe(words: argparse.ArgumentParser) -> None:
    """Add what names a recipe, and the words that override it, of which there may be `many`."""
    words.add_argument("recipe", metavar="RECIPE", help="a YAML file, see recipes/")
    words.add_argument(
        "overrides",
        metavar="key.sub=value",
        nargs="*",
        help="replaces a value, as in stages.tune.train.steps=100 or output=FOLDER",
    )
    words.set_defaults(many="overrides")
