"""Files and folders that a command writes: checked before the work, written whole or not at all,
and told from others by their digests."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from aimv2_mllm import disk
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
    try:
        with disk.replaced(path) as unfinished:
            save(unfinished)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None


def demand_free(destination: Path) -> None:
    """UsageError where a new folder cannot be made because something is there."""
    if os.path.lexists(destination) and not destination.is_dir():
        raise UsageError(f"{destination}: is a file; give a new folder")
    if destination.is_dir() and any(destination.iterdir()):
        raise UsageError(f"{destination}: is not empty; give a new folder, or remove this one")


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """The folder to write, which becomes `destination` when all is well and is gone when not.

    UsageError for a destination that is in use, and where the disk refuses.
    """
    demand_free(destination)
    try:
        with disk.new_folder(destination) as unfinished:
            yield unfinished
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"{destination}: cannot be written ({said})") from None


def sha256(*paths: Path) -> str:
    """The digest of a file's contents, or of several one behind the other, in hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _formats() -> dict[str, str]:
    """Each ending of a picture that can be written and read, and its format."""
    from PIL import Image

    known = Image.registered_extensions()
    return {end: kind for end, kind in known.items() if kind in Image.SAVE and kind in Image.OPEN}
