"""Which rows are drawn for sample number g of a run, and which stand in for those that cannot be
used: a pure function of (seed, g) over any sources that are read by row."""

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.order import EpochOrder, Mixture, mixed
from aimv2_mllm.errors import RunFailed

MOST_TRIES = 10  # rows tried for one sample
EXAMPLES = 3  # names of unusable rows that are passed on, per batch
T = TypeVar("T")


@dataclass
class Skipped:
    """Rows that could not be used: how many by reason, and the first of them in words."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, error: Unusable) -> None:
        """Count one more."""
        self.counts[error.reason] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{error} ({error.reason})")

    def join(self, other: "Skipped") -> None:
        """Count those of `other` too."""
        self.counts.update(other.counts)
        self.examples += other.examples[: EXAMPLES - len(self.examples)]


class Drawing:
    """Rows of `sources` by the number of a sample; None stands for a source without end, which is
    asked by position and not by row."""

    def __init__(self, sources: Sequence[Any], weights: Sequence[float], seed: int) -> None:
        self._sources, self._mixture = sources, Mixture(weights, mixed(seed, 0))
        self._orders = [
            None if source is None else EpochOrder(source.groups, mixed(seed, 1, number))
            for number, source in enumerate(sources)
        ]
        self.num_rows = [None if source is None else sum(source.groups) for source in sources]
        opened = [source for source in sources if source is not None]
        self.notes = [f"{sum(s.groups):,} rows, the first is {s.name(0)}" for s in opened]
        self.notes += [note for source in opened for note in source.notes]
        digests = " ".join(source.digest for source in opened)
        # Nothing for the embedded world alone, which never changes.
        self.digest = hashlib.sha256(digests.encode()).hexdigest()[:16] if opened else ""

    def turn(self, number: int) -> tuple[int, int]:
        """Which source is sample `number` of, and at which position of that source's own order."""
        return self._mixture.turn(number)

    def rows(self, samples: int) -> list[tuple[int, range]]:
        """Per source, the positions of its first epoch that `samples` samples draw from. Rows that
        stand in for unusable ones may lie behind them."""
        counts = self._mixture.counts(samples)
        orders = [(turn, order) for turn, order in enumerate(self._orders) if order is not None]
        return [(turn, range(min(counts[turn], order.rows))) for turn, order in orders]

    def row(self, turn: int, place: int) -> int:
        """The row of source `turn` that is at that place of its order."""
        order = self._orders[turn]
        assert order is not None, turn
        return order.row(place)

    def is_endless(self, turn: int) -> bool:
        """Whether source `turn` has no rows."""
        return self._orders[turn] is None

    def first_usable(self, number: int, skipped: Skipped, use: Callable[[int, int, int], T]) -> T:
        """What `use` makes of the first row for sample `number` that it can use, as `usable`."""
        return next(self.usable(number, skipped, use))

    def usable(
        self, number: int, skipped: Skipped, use: Callable[[int, int, int], T]
    ) -> Generator[T, None, None]:
        """What `use` makes of the rows for sample `number`, one after the other.

        `use` is given the source, the row, and its place in the order; the rows that it finds
        `Unusable` are added to `skipped`, and so is one of which that is thrown in later. RunFailed
        after `MOST_TRIES` of them.
        """
        turn, position = self.turn(number)
        source, order = self._sources[turn], self._orders[turn]
        assert order is not None, turn
        errors = []
        for place in range(position, position + MOST_TRIES):
            row = order.row(place)
            try:
                yield use(turn, row, place)
            except Unusable as error:
                name = source.name(row)
                text = str(error) if name in str(error) else f"{name}: {error}"
                errors.append(Unusable(error.reason, text))
                skipped.add(errors[-1])
        said = "\n".join(f"  {error} ({error.reason})" for error in errors[:EXAMPLES])
        raise RunFailed(
            f"data.sources.{turn}: {MOST_TRIES} rows one after the other cannot be used, such as\n"
            f"{said}\nmend or remove them, and run the same command again"
        )
