"""When too many rows of the data could not be used, and the words for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aimv2_mllm.errors import RunFailed
from aimv2_mllm.marks import TURNS

FEWEST_ROWS = 200  # below this a share says little
EXAMPLES = 5  # rows named in the message


class Skipping:
    """Ends a run when the share of rows left out passes `most`, a share of all rows tried."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._examples: list[str] = []

    def take_names(self, micro_batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The batches without `skipped_rows`, of which the first few are remembered."""
        taken = [dict(batch) for batch in micro_batches]
        for batch in taken:
            room = EXAMPLES - len(self._examples)
            self._examples += batch.pop("skipped_rows", [])[:room]
        return taken

    def check(self, samples: int, skipped: Mapping[str, int]) -> None:
        """RunFailed when of so many samples of the run too many rows were left out."""
        skipped = {reason: count for reason, count in skipped.items() if reason != TURNS}
        left_out = sum(skipped.values())
        tried = samples + left_out
        if tried < FEWEST_ROWS or left_out <= self._most * tried:
            return
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
        examples = "".join(f"\n  {example}" for example in self._examples)
        raise RunFailed(
            f"{left_out:,} of {tried:,} rows could not be used ({counts}), more than the"
            f" {self._most:.1%} that data.max_skipped allows, such as{examples}\n"
            "allow more, with which the run goes on, or mend or remove them; the same command would"
            " end here again"
        )
