"""Where image-caption rows come from: one class a kind of source, named in `SOURCES`.

A source knows how many rows it has, in `groups` that lie together, and reads each by its number.
What is wrong with the whole source is a UsageError when it is opened; what is wrong with a row is
an `Unusable` when that row is read.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aimv2_mllm.data.files import (
    MAX_PICTURE_BYTES,
    MAX_TEXT_BYTES,
    Later,
    Unusable,
    as_text,
    below,
    read_later,
    read_whole,
)
from aimv2_mllm.data.rows.json_index import LOOKED_AT, open_rows
from aimv2_mllm.data.rows.pairs import PairSource
from aimv2_mllm.data.rows.tables import Table
from aimv2_mllm.data.rows.tars import Shards
from aimv2_mllm.errors import UsageError, show
from aimv2_mllm.recipe.data import CaptionData, FolderSource, HandwritingSource, JsonlSource

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
METADATA = "metadata.jsonl"


class JsonLines(PairSource):
    """A JSON mapping a row: a picture's path below `root`, and its caption."""

    def __init__(self, file: Path, root: Path, *, image: str, caption: str) -> None:
        self._rows, self._root, self._image, self._caption = open_rows(file), root, image, caption
        self.groups, self.notes, self.digest = [len(self._rows)], list[str](), self._rows.digest()
        self._demand_field()

    def _demand_field(self) -> None:
        """UsageError where none of the first rows names a picture."""
        faults = []
        for row in range(min(len(self._rows), LOOKED_AT)):
            try:
                self._fields(row)
                return
            except Unusable as error:
                faults.append(f"{self.name(row)}: {error}")
        raise UsageError(faults[0])

    def _fields(self, row: int) -> dict[str, Any]:
        fields = self._rows.read(row)
        if not isinstance(fields, dict) or not isinstance(fields.get(self._image), str):
            said = ", ".join(fields) if isinstance(fields, dict) else show(fields)
            raise Unusable(
                "odd_row",
                f"has no field {show(self._image)} with a picture's path, it has {said}",
            )
        return fields

    def name(self, row: int) -> str:
        """Where the row is, in words."""
        return f"{self._rows.file}, row {row}"

    def caption(self, row: int) -> tuple[str, Later]:
        """The row's caption, and what reads its picture."""
        fields = self._fields(row)
        caption = fields.get(self._caption)
        if not isinstance(caption, str):
            raise Unusable("no_caption", f"has no text {show(self._caption)}")
        return caption, read_later(below(self._root, fields[self._image]), MAX_PICTURE_BYTES)


class Folder(PairSource):
    """Pictures in a folder and those in it, each with its caption in a .txt beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = sorted(_pictures(folder))
        if not self._names:
            known = ", ".join(ENDINGS)
            raise UsageError(f"{folder}: has no pictures ({known}); give another folder")
        names = "\0".join(self._names).encode("utf-8", "surrogateescape")
        self.groups, self.notes = [len(self._names)], list[str]()
        self.digest = hashlib.sha256(names).hexdigest()

    def name(self, row: int) -> str:
        """Where the row is, in words."""
        return str(self._folder / self._names[row])

    def caption(self, row: int) -> tuple[str, Later]:
        """The row's caption, and what reads its picture."""
        path = below(self._folder, self._names[row])
        text = below(self._folder, str(Path(self._names[row]).with_suffix(".txt")))
        if not text.exists():
            raise Unusable("no_caption", f"{path}: there is no {text.name} beside it")
        caption = as_text(read_whole(text, MAX_TEXT_BYTES), str(text))
        return caption, read_later(path, MAX_PICTURE_BYTES)


def _pictures(folder: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror})")

    for parent, _, files in os.walk(folder, onerror=refuse):  # follows no links to folders
        for file in files:
            if file.lower().endswith(ENDINGS):
                yield os.path.relpath(os.path.join(parent, file), folder)


def _open_jsonl(config: JsonlSource) -> PairSource:
    file = Path(config.file).expanduser()
    root = Path(config.root or file.parent).expanduser()
    return JsonLines(file, root, image=config.image, caption=config.caption)


def _open_folder(config: FolderSource) -> PairSource:
    folder = Path(config.folder).expanduser()
    if (file := folder / METADATA).is_file():
        return JsonLines(file, folder, image="file_name", caption=config.caption)
    return Folder(folder)


SOURCES: dict[str, Callable[[Any], PairSource]] = {
    "shards": Shards,
    "datasets": Table,
    "folder": _open_folder,
    "jsonl": _open_jsonl,
}


def open_source(config: Any) -> PairSource:
    """The source that a section of a recipe names."""
    return SOURCES[config.kind](config)


def open_sources(data: CaptionData) -> list[PairSource | None]:
    """The sources of `data` in its order, None for the embedded world, which needs no opening.

    UsageError where one is not there, is damaged as a whole, or has no rows.
    """
    found: list[PairSource | None] = []
    for number, config in enumerate(data.sources):
        source = None if isinstance(config, HandwritingSource) else open_source(config)
        if source is not None and not sum(source.groups):
            notes = "".join(f"; {note}" for note in source.notes)
            raise UsageError(f"data.sources.{number}: has no rows{notes}")
        found.append(source)
    return found
