"""What of an export can be chosen, and where it goes."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from aimv2_mllm.errors import UsageError

UNITS = {"MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"(\d{1,6})(MB|GB)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Options:
    """Choices of the command line: None where the source's own, or the usual, is meant.

    `dtype_name` is torch's, as in float32; `most_bytes` of a file of weights; `layout` of an
    encoder.
    """

    destination: Path
    narrate: Callable[[str], None]
    dtype_name: str | None = None
    most_bytes: int | None = None
    layout: str | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which weights are written."""
        return None if self.dtype_name is None else getattr(torch, self.dtype_name)


def size_in_bytes(text: str) -> int:
    """The bytes that a text such as 5GB or 500MB stands for; UsageError for another."""
    match = _SIZE.fullmatch(text)
    if match is None or not int(match[1]):
        raise UsageError(f"--max-shard-size is {text}, must be a size such as 5GB or 500MB")
    return int(match[1]) * UNITS[match[2].upper()]
