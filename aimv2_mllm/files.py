"""Files that a command writes: checked before the work, written whole or not at all, and told from
others by their digests."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aimv2_mllm.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image


def demand_place(path: Path, example: str) -> None:
    """UsageError where no file of that name, such as `example`, can be written."""
    if os.path.isdir(path):
        raise UsageError(f"{path}: is a folder; give a file, such as {path / example}")
    if not os.path.isdir(path.parent):
        raise UsageError(f"{path}: there is no folder {path.parent}; make it first")


def demand_picture_place(path: Path, example: str = "picture.png") -> None:
    """The same, and UsageError for an ending that is no picture's."""
    demand_place(path, example)
    if path.suffix.lower() not in _formats():
        raise UsageError(f"{path}: its ending is no picture's; give .png, .jpg, .webp or .tiff")


def write_picture(path: Path, picture: "Image.Image") -> None:
    """Write `picture` in the format of the path's ending; UsageError where that cannot be."""
    write(path, lambda unfinished: picture.save(unfinished, format=_formats()[path.suffix.lower()]))


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write another file, then put it in place; UsageError where that cannot be."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save(unfinished)
        unfinished.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if os.path.exists(unfinished):
            unfinished.unlink()


def sha256(path: Path) -> str:
    """The digest of a file's contents, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _formats() -> dict[str, str]:
    """Each ending of a picture that can be written and read, and its format."""
    from PIL import Image

    known = Image.registered_extensions()
    return {end: kind for end, kind in known.items() if kind in Image.SAVE and kind in Image.OPEN}
