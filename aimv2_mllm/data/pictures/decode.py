"""From an encoded picture to the pixels of one sample, decoding no more than the size needs.

A JPEG is decoded at 1/2, 1/4 or 1/8 where that is still at least what the sample needs: its decoder
then does only that share of the work. Refuses what `images.opened` refuses.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from aimv2_mllm.data.pictures.images import MAX_SQUARE_SIDE, as_rgb, opened, orientation, upright

# AIMv2's augmentation (section 2 of its paper's appendix): share of the area, and width / height.
AREA = (0.4, 1.0)
ASPECT = (3 / 4, 4 / 3)
TRIES = 10  # for a crop that fits, as torchvision has it


# From a picture's width and height to those it gets, in pixels.
Fit = Callable[[int, int], tuple[int, int]]


class Box(NamedTuple):
    """A part of a picture, in pixels from its top left."""

    left: float
    top: float
    width: float
    height: float


def middle_square(width: int, height: int) -> Box:
    """The largest square in the middle: what an encoder sees outside of training."""
    side = min(width, height)
    return Box((width - side) / 2, (height - side) / 2, side, side)


def whole(width: int, height: int) -> Box:
    """All of the picture: what an encoder for any size sees."""
    return Box(0, 0, width, height)


def random_crop(width: int, height: int, random: np.random.Generator) -> Box:
    """A part with a share of the area and an aspect drawn from `AREA` and `ASPECT` (on a log
    scale); where none of `TRIES` fits, the largest in the middle whose aspect is allowed."""
    for _ in range(TRIES):
        area = random.uniform(*AREA) * width * height
        aspect = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            left, top = random.integers(width - wide + 1), random.integers(height - high + 1)
            return Box(int(left), int(top), wide, high)
    aspect = min(max(width / height, ASPECT[0]), ASPECT[1])
    wide, high = min(width, round(height * aspect)), min(height, round(width / aspect))
    wide, high = max(wide, 1), max(high, 1)
    return Box((width - wide) // 2, (height - high) // 2, wide, high)


def decode(content: bytes, size: int | Fit, choose: Callable[[int, int], Box]) -> np.ndarray:
    """A part of an encoded picture, resized bicubically to (height, width, 3) uint8.

    `size` is the side of a square, or gives width and height from those of the picture as it stands
    upright; `choose` gives the part from the same. Of something animated the first picture is
    taken. Raises `Unusable` for what is no whole picture.
    """

    def wanted(width: int, height: int) -> tuple[int, int]:
        return (size, size) if isinstance(size, int) else size(width, height)

    with opened(io.BytesIO(content)) as picture:
        if isinstance(picture, JpegImageFile):
            turned = orientation(picture) in (5, 6, 7, 8)  # lies on its side
            width, height = picture.size[::-1] if turned else picture.size
            box, to = choose(width, height), wanted(width, height)
            # The whole at the size where the part is just large enough.
            needed = math.ceil(width * to[0] / box.width), math.ceil(height * to[1] / box.height)
            drafted = picture.draft(None, needed[::-1] if turned else needed)
            # Its answer is the whole in pixels of what will be decoded, unrounded.
            scale = 1.0 if drafted is None else drafted[1][2] / (height if turned else width)
            picture.load()
            return _resized(upright(picture), Box(*(side * scale for side in box)), to)
        picture.load()
        standing = upright(picture)
        return _resized(standing, choose(*standing.size), wanted(*standing.size))


def decode_padded(content: bytes, size: int, rim: tuple[int, int, int]) -> np.ndarray:
    """The whole of an encoded picture in the middle of a square of the colour `rim`, resized
    bicubically to (size, size, 3) uint8, as LLaVA does it. Refuses what `decode` refuses.
    """
    with opened(io.BytesIO(content)) as picture:
        if isinstance(picture, JpegImageFile):
            # The longer side at least `size`, and so the other in proportion.
            scale = size / max(picture.size)
            width, height = picture.size
            picture.draft(None, (math.ceil(width * scale), math.ceil(height * scale)))
        picture.load()
        return padded(as_rgb(upright(picture)), size, rim)


def padded(picture: Image.Image, size: int, rim: tuple[int, int, int]) -> np.ndarray:
    """An upright RGB picture as `decode_padded` gives it."""
    side = max(picture.size)
    if side > MAX_SQUARE_SIDE:  # the square of a long strip would not fit into memory
        picture = picture.copy()
        picture.thumbnail((MAX_SQUARE_SIDE, MAX_SQUARE_SIDE))
        side = max(picture.size)
    square = Image.new("RGB", (side, side), rim)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def cropped(picture: Image.Image, size: int) -> np.ndarray:
    """The middle of an upright RGB picture as `decode` gives it."""
    return _resized(picture, middle_square(*picture.size), (size, size))


def rim_of(mean: Sequence[float]) -> tuple[int, int, int]:
    """LLaVA's rim: the colour that becomes 0 when it is normalised by `mean`, of 0 to 1."""
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def _resized(picture: Image.Image, box: Box, size: tuple[int, int]) -> np.ndarray:
    # Only the part is converted, cut at whole pixels around the box; but the range of deep grey is
    # told from the whole.
    picture = as_rgb(picture) if picture.mode[0] in "IF" else picture
    left, top = math.floor(box.left), math.floor(box.top)
    right = min(math.ceil(box.left + box.width), picture.width)
    bottom = min(math.ceil(box.top + box.height), picture.height)
    part = as_rgb(picture.crop((left, top, right, bottom)))
    inside = (
        box.left - left,
        box.top - top,
        min(box.left + box.width - left, part.width),
        min(box.top + box.height - top, part.height),
    )
    return np.asarray(part.resize(size, Image.Resampling.BICUBIC, box=inside))
