"""Pictures from files: opened safely, made square without losing anything.

Refuses what is no picture, what is cut off, and what would not fit into memory, before decoding it.
"""

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.errors import UsageError

MAX_PIXELS = 64_000_000  # what is decoded at most: 192 MB as RGB
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")  # Pillow starts a program for some others
MAX_SQUARE_SIDE = 8000  # pixels; a long strip is scaled down to it, for its square would be huge


def open_image(path: str | Path) -> Image.Image:
    """The picture in a file as RGB, turned as its EXIF tag says, transparency laid on white.

    Raises UsageError on anything that is not a whole picture of at most `MAX_PIXELS` pixels.
    """
    file = Path(path)
    if os.path.isdir(file):
        raise UsageError(f"{file}: is a folder; give a picture file such as PNG or JPEG")
    try:
        with file.open("rb") as stream:
            return decoded(stream)
    except FileNotFoundError:
        raise UsageError(f"{file}: there is no such picture") from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from None
    except Unusable as error:
        raise UsageError(f"{file}: {error}") from None


def decoded(stream: BinaryIO, most: int | None = None) -> Image.Image:
    """The picture in `stream`, of `most` pixels at most, as `open_image` gives one; `Unusable` as
    `opened` says."""
    with opened(stream, most) as picture:
        picture.load()
        return as_rgb(upright(picture))


@contextmanager
def opened(stream: BinaryIO, most: int | None = None) -> Iterator[Image.Image]:
    """The picture in `stream` with its size known and nothing decoded.

    What Pillow raises while it is opened or used becomes `Unusable` (undecodable or too_large), but
    for errors of the system. A size above `most` (`MAX_PIXELS`) is refused before anything is
    decoded.
    """
    most = most or MAX_PIXELS
    try:
        with warnings.catch_warnings():
            # Odd palettes and metadata are warned of; large sizes too, and our limit is lower.
            warnings.simplefilter("ignore")
            with Image.open(stream, formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > most:
                    raise Unusable(
                        "too_large",
                        f"has {width:,} x {height:,} pixels, and {most:,} are the most;"
                        " scale it down first",
                    )
                yield picture
    except Unusable:
        raise
    except UnidentifiedImageError:
        text = "is not a picture; give a PNG, JPEG, WebP, GIF or TIFF file"
        raise Unusable("undecodable", text) from None
    except Image.DecompressionBombError:
        text = f"has more than {most:,} pixels, which is the most; scale it down first"
        raise Unusable("too_large", text) from None
    except (OSError, SyntaxError, ValueError, struct.error, EOFError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        text = f"the picture is damaged or cut off ({error})"
        raise Unusable("undecodable", text) from None


def orientation(picture: Image.Image) -> int:
    """What the EXIF says of how the picture lies, 1 to 8; 1, as it lies, when it cannot be read."""
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return 1


def upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF says; as it lies when that cannot be read, for the pixels are sound."""
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError, struct.error):
        return picture


def as_rgb(picture: Image.Image) -> Image.Image:
    """`picture` as RGB: transparency laid on white, 16- and 32-bit grey scaled to 8 bits."""
    if picture.mode.startswith(
        ("I", "F")
    ):  # 16- and 32-bit grey: Pillow's own conversion would clip it
        values = np.asarray(picture, dtype=np.float64)
        top = 65535 if picture.mode.startswith("I;16") or values.max() > 255 else 255
        picture = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        )
    return picture.convert("RGB")


def square(picture: Image.Image) -> Image.Image:
    """`picture` in the middle of the smallest square that holds it, so that a centre crop cuts
    nothing off.

    The rim has the colour that fills most of the picture's own edge (its median).
    """
    if picture.width == picture.height:
        return picture
    if max(picture.size) > MAX_SQUARE_SIDE:
        picture = picture.copy()
        picture.thumbnail((MAX_SQUARE_SIDE, MAX_SQUARE_SIDE))  # no side becomes 0, as in contain
    pixels = np.asarray(picture)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = (int(value) for value in np.median(edge, axis=0))
    side = max(picture.size)
    return ImageOps.pad(picture, (side, side), color=(red, green, blue))
