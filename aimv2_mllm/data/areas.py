"""The sizes of the native-resolution stage: an area for each mini-batch, a grid for each image.

Source: arXiv 2411.14402, native resolution. Owns numbers only; opens no image, resizes none.
"""

from __future__ import annotations

import math

import numpy as np

MIN_PATCHES, MAX_PATCHES = 112, 4096  # what the released native encoder takes
LEAST, MOST = 7, 12  # an area is 2 ** n patches, with n between these


def draw_area(generator: np.random.Generator) -> int:
    """The most patches that an image of a mini-batch may have: 2 ** n, rounded down, 128..4096.

    n is a unit normal cut at -1 and 1 (one beyond is drawn again), mapped linearly onto 7..12.
    """
    while abs(normal := generator.standard_normal()) > 1:
        pass
    return int(2 ** (LEAST + (MOST - LEAST) * (normal + 1) / 2))


def batch_size(area: int, patches_per_batch: int) -> int:
    """How many images of `area` patches make a mini-batch: its number of patches is constant.

    Raises ValueError when a batch could not hold one image of every area.
    """
    if patches_per_batch < MAX_PATCHES:
        raise ValueError(
            f"patches_per_batch must be at least {MAX_PATCHES}, the largest image, and is "
            f"{patches_per_batch}"
        )
    return patches_per_batch // area


def grid(height: int, width: int, area: int) -> tuple[int, int]:
    """The (rows, columns) of patches to resize an image of `height` x `width` pixels to.

    There are 112 to `area` of them, in the image's aspect ratio as far as whole patches allow: the
    short side is rounded down, and the long one then to the nearest. An image longer than it has
    patches for becomes a row or column of them. Small images grow. In pixels the image becomes 14
    times as high and as wide. Raises ValueError on an image without pixels and on an area outside
    128..4096.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image of {height} x {width} pixels cannot be resized")
    if not 2**LEAST <= area <= MAX_PATCHES:
        raise ValueError(f"area must lie in {2**LEAST}..{MAX_PATCHES} patches, and is {area}")
    ratio = max(height, width) / min(height, width)
    short = max(1, math.isqrt(int(area / ratio)))
    long = min(max(round(short * ratio), math.ceil(MIN_PATCHES / short)), area // short)
    return (short, long) if height <= width else (long, short)
