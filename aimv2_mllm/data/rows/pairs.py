"""What a source of image-caption pairs is, whatever it reads from."""

from typing import Protocol

from aimv2_mllm.data.files import Later


class PairSource(Protocol):
    """Rows by number."""

    groups: list[int]  # how many rows lie together, in order; their sum is the number of rows
    notes: list[str]  # what a user should know of it
    digest: str  # changes when other rows would be read

    def caption(self, row: int) -> tuple[str, Later]:
        """The caption of a row, and what reads its encoded picture; `Unusable` where one of them
        cannot be had, as far as that shows before the picture is read."""

    def name(self, row: int) -> str:
        """Where the row is, in words."""

    def read(self, row: int) -> tuple[bytes, str]:
        """The encoded picture and the caption of a row; `Unusable` where they cannot be had."""
        caption, picture = self.caption(row)
        return picture(), caption
