"""Numbers as people read them, alike wherever they stand."""

from collections.abc import Iterable

GIB = 2**30  # bytes


def percent(share: float) -> str:
    """A share of 1 in percent."""
    return f"{100 * share:.1f}"


def percents(ends: Iterable[float]) -> str:
    """From which share of 1 to which, in percent."""
    return " to ".join(map(percent, ends))


def part_row(part: str, count: int, is_trained: bool) -> str:
    """A row of the table of a model's parts."""
    return f"{part:<12}{count:>15,}  {'trained' if is_trained else 'frozen'}"
