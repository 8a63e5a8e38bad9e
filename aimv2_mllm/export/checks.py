"""What two answers of a model must have in common, as lines with the largest difference found.

Owns the tolerances. Refuses nothing: a check that fails is a line that says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# Of float32 sums in another order, as a share of the largest logit.
TOLERANCE = 1e-4
ROUNDED = 3e-2  # where what is compared was rounded to bfloat16, which has 8 bits
Check = tuple[bool, str]


def recent_enough(has: str, minimum: str) -> Check:
    """Whether transformers' version is at least the `minimum`, by its first two numbers."""
    enough = _numbers(has) >= _numbers(minimum)
    text = f"transformers: {has}, {minimum} or newer is needed"
    if not enough:
        text += (
            f"; older ones read other features of the tower: pip install 'transformers>={minimum}'"
        )
    return enough, text


def _numbers(version: str) -> tuple[int, ...]:
    pieces = version.split(".")[:2]
    return tuple(int("".join(c for c in piece if c.isdigit()) or 0) for piece in pieces)


def loaded(found: Mapping[str, Any], wanted: str) -> list[Check]:
    """Whether the class is the `wanted` one, and all of its weights were there and no others."""
    faults, name = found["faults"], found["class"]
    more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return [
        (name == wanted, f"loads without aimv2_mllm: as {name}"),
        (
            not faults,
            f"weights: {'; '.join(faults[:3]) + more if faults else 'all, and no others'}",
        ),
    ]


def compared(
    found: Mapping[str, Any], other: Mapping[str, Any], whose: str, tolerance: float = TOLERANCE
) -> list[Check]:
    """The checks that `found` and the `other` answers are the same."""
    off = _farthest(found["pixels"], other["pixels"])
    largest = max((abs(x) for row in other["logits"] for x in row), default=0.0)
    bound = tolerance * max(1.0, largest)
    far = max(
        (_farthest(a, b) for a, b in zip(found["logits"], other["logits"], strict=True)),
        default=float("inf"),
    )
    same_columns = found["columns"] == other["columns"]
    mine, theirs = found["tokens"], other["tokens"]
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    at = min(len(mine), len(theirs)) if at is None else at
    same = mine == theirs
    told = f"{len(mine)} equal to those of" if same else f"differ from number {at} on, from"
    return [
        (found["picture"] == other["picture"], f"picture: that of {whose}"),
        (off < 1e-5, f"pixels: largest difference {off:.1e} to {whose}"),
        (found["input_ids"] == other["input_ids"], f"prompt: the tokens of {whose}"),
        (
            same_columns and far <= bound,
            f"logits: largest difference {far:.1e} to {whose}, at most {bound:.1e}",
        ),
        (same, f"greedy tokens: {told} {whose}"),
    ]


def _farthest(left: Sequence[float], right: Sequence[float]) -> float:
    if len(left) != len(right):
        return float("inf")
    far = max((abs(a - b) for a, b in zip(left, right, strict=True)), default=0.0)
    return far if far == far else float("inf")  # NaN is not near


def seen_alike(found: Mapping[str, Any], other: Mapping[str, Any], whose: str) -> list[Check]:
    """The checks that an encoder's pixels and features are those of the `other` answers."""
    off, far = (_farthest(found[key], other[key]) for key in ("pixels", "features"))
    bound = TOLERANCE * max(1.0, *map(abs, other["features"]))
    text = f"features: largest difference {far:.1e} to {whose}, at most {bound:.1e}"
    return [
        (off < 1e-5, f"pixels: largest difference {off:.1e} to {whose}"),
        (found["shape"] == other["shape"] and far <= bound, text),
    ]
