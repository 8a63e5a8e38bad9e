"""The sizes of native-resolution training: an area for each mini-batch, a grid for each picture.

Source: arXiv 2411.14402, native resolution: an area is 2 ** n patches, with n a unit normal cut at
-1 and 1 and mapped linearly onto 7..12; the pictures of a mini-batch keep their aspect ratio and
fit its area, and are as many as make a constant number of patches. Owns numbers only.

Mini-batches hold different numbers of samples, and still nobody has to count from the start: areas
are dealt out in blocks of `BLOCK` mini-batches, to each block the same ones (the middles of `BLOCK`
equal shares of that normal), in an order drawn anew per block. So a block's samples are always as
many, and those of mini-batch m follow from m alone.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from aimv2_mllm.data.order import mixed, permuted

BLOCK = 4096  # mini-batches to which areas are dealt out at once


class MiniBatch(NamedTuple):
    """How many patches a picture of it may have, its first sample, and its number of them."""

    area: int
    first: int
    size: int


class Areas:
    """The mini-batches of a run by number, with areas of `least` to `most` patches.

    Each holds `num_patches` (>= `most`) patches, less a remainder smaller than one picture.
    """

    def __init__(self, least: int, most: int, num_patches: int, key: int) -> None:
        assert least <= most <= num_patches, (least, most, num_patches)
        self._key = key
        self._areas = _cut_normal(math.log2(least), math.log2(most))  # (BLOCK,)
        self._counts = num_patches // self._areas
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def mini_batch(self, number: int) -> MiniBatch:
        """Mini-batch `number` of the run, from 0 on; they have no end."""
        block, slot = divmod(number, BLOCK)
        if self._block is None or self._block[0] != block:  # the last one is kept
            order = permuted(np.arange(BLOCK), BLOCK, mixed(self._key, block))
            counts = self._counts[order]
            self._block = block, order, np.cumsum(counts) - counts
        _, order, starts = self._block
        place, first = order[slot], block * int(self._counts.sum()) + int(starts[slot])
        return MiniBatch(int(self._areas[place]), first, int(self._counts[place]))


def _cut_normal(low: float, high: float) -> np.ndarray:
    """The areas of a block, the least first: (BLOCK,) int64."""
    normal = NormalDist()
    shares = (np.arange(BLOCK) + 0.5) / BLOCK * (normal.cdf(1) - normal.cdf(-1)) + normal.cdf(-1)
    exponents = [low + (high - low) * (normal.inv_cdf(share) + 1) / 2 for share in shares]
    return np.array([int(2**exponent) for exponent in exponents])


def grid(height: int, width: int, area: int) -> tuple[int, int]:
    """The (rows, columns) of patches to resize a picture of `height` x `width` pixels to.

    They are at most `area`, in the picture's aspect ratio as far as whole patches allow: the short
    side is rounded down, and the long one then to the nearest. A picture longer than it has patches
    for becomes a row or column of them. Small pictures grow. Raises ValueError on one without
    pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a picture of {height} x {width} pixels cannot be resized")
    ratio = max(height, width) / min(height, width)
    short = max(1, math.isqrt(int(area / ratio)))
    long = min(round(short * ratio), area // short)
    return (short, long) if height <= width else (long, short)
