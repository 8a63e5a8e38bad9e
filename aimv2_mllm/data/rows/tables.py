"""Rows of data sets of the library `datasets`, their pictures left encoded."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from aimv2_mllm.data.files import MAX_PICTURE_BYTES, Later, Unusable, read_later, read_whole
from aimv2_mllm.data.rows.pairs import PairSource
from aimv2_mllm.errors import UsageError, first_line, nearest, show
from aimv2_mllm.recipe.data import DatasetsSource


class _Named(Protocol):
    """What names a data set of the library `datasets`."""

    dataset: str
    config: str | None
    split: str


class Table(PairSource):
    """The rows of a data set of the library `datasets`."""

    def __init__(self, config: DatasetsSource) -> None:
        columns = {"image": config.image, "caption": config.caption}
        self._config = config
        rows, self.digest = load_table(config, columns)
        self._captions = rows.select_columns([config.caption])
        self._pictures = Pictures(rows, config.image)
        self.groups, self.notes = [len(rows)], list[str]()

    def name(self, row: int) -> str:
        """Where the row is, in words."""
        return f"{self._config.dataset}, row {row}"

    def caption(self, row: int) -> tuple[str, Later]:
        """The row's caption, and what reads its picture."""
        caption = self._captions[row][self._config.caption]
        if not isinstance(caption, str):
            raise Unusable("no_caption", f"{self.name(row)}: its caption is no text")
        pictures = self._pictures.of(row)
        if len(pictures) != 1:
            raise Unusable("unreadable", f"{self.name(row)}: has {len(pictures)} pictures")
        return caption, picture_later(pictures[0])


class Pictures:
    """A column with a picture, or several, a row, whose bytes stay in the file."""

    def __init__(self, rows: Any, column: str) -> None:
        self._rows, self._column = rows.select_columns([column]).with_format("arrow"), column

    def of(self, row: int) -> list[Any]:
        """The pictures of a row for `picture_later`, none of them looked at."""
        import pyarrow as pa

        value = self._rows[row][self._column][0]
        if not value.is_valid:
            return []
        return list(value.values) if isinstance(value, pa.ListScalar) else [value]


def picture_later(value: Any) -> Later:
    """What reads a picture of `Pictures`, as `picture_bytes` does; `Unusable` where it is not
    there."""
    import pyarrow as pa

    inner = value
    if isinstance(value, pa.StructScalar) and value.is_valid:
        inner = value.get("bytes")
        if inner is None or not inner.is_valid or not inner.as_buffer().size:
            inner = value.get("path")
    if inner is None or not inner.is_valid:
        raise Unusable("unreadable", "has no picture")
    if isinstance(inner, pa.StringScalar):
        return read_later(Path(inner.as_py()), MAX_PICTURE_BYTES)
    return lambda: picture_bytes(value.as_py())


def picture_bytes(picture: Any) -> bytes:
    """The encoded picture in a field of a table; `Unusable` where there is none."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, str):
        picture = read_whole(Path(picture), MAX_PICTURE_BYTES)
    if not isinstance(picture, bytes):
        raise Unusable("unreadable", "has no picture")
    return picture


def load_table(config: _Named, columns: Mapping[str, str]) -> tuple[Any, str]:
    """The rows that `config` names, with pictures left encoded, and a digest of them.

    UsageError where they cannot be had, or lack one of `columns`, given as {key of the recipe:
    column}.
    """
    rows = _table(config)
    known = rows.column_names
    for key, column in columns.items():
        if column not in known:
            raise UsageError(
                f"{config.dataset}: has no column {show(column)} ({key}); it has"
                f" {', '.join(known)}{nearest(column, known)}"
            )
    from datasets import Image as Pictures
    from datasets import List

    for column in columns.values():
        kind = rows.features[column]
        # As files and not as pictures: they are decoded here, at the size needed.
        if isinstance(kind, Pictures):
            rows = rows.cast_column(column, Pictures(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Pictures):
            rows = rows.cast_column(column, List(Pictures(decode=False)))
    facts = f"{len(rows)} {rows.features} {rows._fingerprint}"
    return rows, hashlib.sha256(facts.encode()).hexdigest()


def _table(config: _Named) -> Any:
    rows = load_dataset(config.dataset, config.config, config.split)
    if isinstance(rows, dict):  # a folder has all splits
        if config.split not in rows:
            known = f"{', '.join(rows)}{nearest(config.split, rows)}"
            raise UsageError(f"{config.dataset}: has no split {config.split}; it has {known}")
        rows = rows[config.split]
    if not len(rows):
        raise UsageError(f"{config.dataset}: split {config.split} has no rows")
    return rows


def load_dataset(name: str, config: str | None = None, split: str | None = None) -> Any:
    """What the library `datasets` knows as `name`: what was saved to a folder, which may be several
    splits, or that split of a hub's, without one all of them. UsageError where it cannot be had."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"{name}: a data set needs the library datasets: pip install 'aimv2-mllm[data]'"
        ) from None
    try:
        if os.path.isdir(name):
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, config, split=split)
    # Each builder has its own kinds of errors, and the hub's are no OSError.
    except Exception as error:
        where = "" if os.path.isdir(name) else " from the hub, and there is no such folder"
        raise UsageError(f"{name}: cannot be loaded{where} ({first_line(error)})") from None
