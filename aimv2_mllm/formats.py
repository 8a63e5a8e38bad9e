"""Numbers as people read them, alike wherever they stand."""

GIB = 2**30  # bytes


def percent(share: float) -> str:
    """A share of 1 in percent."""
    return f"{100 * share:.1f}"


def part_row(part: str, count: int, is_trained: bool) -> str:
    """A row of the table of a model's parts."""
    return f"{part:<12}{count:>15,}  {'trained' if is_trained else 'frozen'}"
