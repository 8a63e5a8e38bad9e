"""Image-caption rows in tar shards, local or behind a URL, each read by its place in the shard.

A row costs one read of its picture and two small ones of its header and caption, whatever the
order; nothing is unpacked and no member's name ever becomes a path.
"""

import hashlib
import json
import os
import stat
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from aimv2_mllm.data.files import (
    MAX_PICTURE_BYTES,
    MAX_TEXT_BYTES,
    Later,
    Unusable,
    as_text,
    local_files,
    read_at,
    regular_file,
)
from aimv2_mllm.data.rows.columns import INDEX_ENDING
from aimv2_mllm.data.rows.local_copies import ShardCache, remote_files, user_cache
from aimv2_mllm.data.rows.pairs import PairSource
from aimv2_mllm.data.rows.tar_index import (
    BLOCK,
    ShardIndex,
    build_index,
    is_of_shard,
    load_index,
    save_index,
)
from aimv2_mllm.errors import RunFailed, UsageError, show
from aimv2_mllm.recipe.data import ShardsSource

KEPT_INDICES = 64  # of 10,000 rows each: 24 MB


@dataclass(frozen=True)
class Shard:
    """One shard: its path or URL, its bytes, and what changes when it changes."""

    url: str
    size: int
    stamp: str

    @property
    def is_remote(self) -> bool:
        """Whether a copy of it is read."""
        return "://" in self.url


class Shards(PairSource):
    """The rows of all shards of one source, in the order in which the recipe names them."""

    def __init__(self, config: ShardsSource) -> None:
        folder = Path(config.cache).expanduser() if config.cache else user_cache()
        self._cache, self._field = ShardCache(folder, config.cache_gib), config.caption
        self._shards = [shard for pattern in config.urls for shard in _found(pattern)]
        self._indices: dict[int, ShardIndex] = {}
        self.groups: list[int] = []
        self._digests: list[str] = []
        self.notes: list[str] = []
        shards = tqdm(self._shards, desc="opening shards", unit="shard", delay=1, disable=None)
        for shard in shards:
            index = self._load(shard)
            self.groups.append(index.rows)
            self._digests.append(index.digest())
            if index.left_out:
                what = ", ".join(f"{count:,} {why}" for why, count in index.left_out.items())
                self.notes.append(f"{shard.url}: {index.rows:,} rows are used; left out: {what}")
        self._ends = np.cumsum(self.groups)
        # Where they lie is left out: a corpus that was moved is the same corpus.
        self.digest = hashlib.sha256(" ".join(self._digests).encode()).hexdigest()

    def name(self, row: int) -> str:
        """Where the row is, in words."""
        number, place = self._place(row)
        return f"{self._shards[number].url}, row {place}"

    def caption(self, row: int) -> tuple[str, Later]:
        """The row's caption, and what reads its picture; `Unusable` where one is not there.

        RunFailed when the shard is not what it was when it was opened.
        """
        number, place = self._place(row)
        shard, index = self._shards[number], self._index(number)
        columns = {name: int(column[place]) for name, column in index.columns.items()}
        name = f"{shard.url}, row {place}"
        if columns["image_size"] == 0:
            raise Unusable("empty", f"{name}: the picture is empty")
        if columns["text_size"] < 0:
            raise Unusable("no_caption", f"{name}: has no caption")
        if columns["image_size"] > MAX_PICTURE_BYTES or columns["text_size"] > MAX_TEXT_BYTES:
            raise Unusable("too_large", f"{name}: its picture or caption is too large to be read")
        picture = (columns["image_offset"], columns["image_size"])
        header, text = self._pieces(
            shard, (picture[0] - BLOCK, BLOCK), (columns["text_offset"], columns["text_size"])
        )
        if zlib.crc32(header) != columns["header_crc"]:
            raise _changed(shard)
        caption = as_text(text, name)
        caption = _field(caption, self._field, name) if columns["text_is_json"] else caption
        return caption, lambda: self._pieces(shard, picture)[0]

    def _pieces(self, shard: Shard, *pieces: tuple[int, int]) -> list[bytes]:
        """Those pieces of a shard, given as their first byte and their number of bytes."""
        for _ in range(3):  # another process may drop a copy between finding and opening it
            try:
                with suppress(FileNotFoundError), regular_file(self._local(shard)) as descriptor:
                    found = [read_at(descriptor, begin, size) for begin, size in pieces]
                    if any(len(one) != size for one, (_, size) in zip(found, pieces, strict=True)):
                        raise _changed(shard)
                    return found
            except OSError as error:
                raise RunFailed(
                    f"{shard.url}: cannot be read any more ({error.strerror})"
                ) from None
        raise _changed(shard)

    def _place(self, row: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        return number, row - (int(self._ends[number - 1]) if number else 0)

    def _local(self, shard: Shard) -> Path:
        return self._cache.fetch(shard.url, shard.size) if shard.is_remote else Path(shard.url)

    def _index(self, number: int) -> ShardIndex:
        """The index of one shard, from memory or from its sidecar."""
        if number not in self._indices:
            if len(self._indices) >= KEPT_INDICES:
                del self._indices[next(iter(self._indices))]
            index = self._load(self._shards[number])
            if index.digest() != self._digests[number]:
                raise _changed(self._shards[number])
            self._indices[number] = index
        return self._indices[number]

    def _load(self, shard: Shard) -> ShardIndex:
        absolute = shard.url if shard.is_remote else os.path.abspath(shard.url)
        sidecars = [self._cache.path(absolute, INDEX_ENDING)]
        if not shard.is_remote:
            sidecars.insert(0, Path(f"{shard.url}{INDEX_ENDING}"))
        try:
            for path in sidecars:
                index = load_index(path, shard.size, shard.stamp)
                if index is not None and (shard.is_remote or is_of_shard(index, Path(shard.url))):
                    return index
            index = build_index(self._local(shard), shard.url)
        except OSError as error:
            raise UsageError(f"{shard.url}: cannot be read ({error.strerror})") from None
        # Beside the shard, or in the cache where that cannot be written.
        save_index(index, sidecars, shard.size, shard.stamp)
        return index


def _found(pattern: str) -> list[Shard]:
    if "://" in pattern and not pattern.startswith("file://"):
        return [Shard(*facts) for facts in remote_files(pattern)]
    found = []
    for name in local_files(pattern.removeprefix("file://")):
        try:
            status = os.stat(name)
        except OSError as error:
            raise UsageError(f"{name}: cannot be read ({error.strerror})") from None
        if not stat.S_ISREG(status.st_mode):  # said before anything opens it
            raise UsageError(f"{name}: is not a regular file (a folder, pipe or device)")
        found.append(Shard(name, status.st_size, str(status.st_mtime_ns)))
    return found


def _field(text: str, field: str, name: str) -> str:
    try:
        caption = json.loads(text)[field]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Unusable("no_caption", f"{name}: its JSON has no field {show(field)}") from None
    if not isinstance(caption, str):
        raise Unusable("no_caption", f"{name}: its field {show(field)} is no text")
    return caption


def _changed(shard: Shard) -> RunFailed:
    return RunFailed(
        f"{shard.url}: is not the shard that was opened: it changed while the run was reading it;"
        " put it back and run the same command again"
    )
