"""Where each row of a tar shard lies: the sidecar `NAME.tar.index.safetensors`.

Built once by reading the headers alone; nothing is ever extracted. A row is a picture with its
caption: members of the same name up to its first dot, as WebDataset lays them out. Left out, and
counted by why: names that are absolute or lead upwards, links and devices, and what a cut has
taken. An index says which shard it is of, and is built anew when that shard has changed.
"""

import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from aimv2_mllm.data.files import read_at, regular_file
from aimv2_mllm.data.rows.columns import (
    Columns,
    Facts,
    digest_of,
    is_of,
    load_columns,
    save_columns,
)
from aimv2_mllm.errors import UsageError

VERSION = "1"
BLOCK = tarfile.BLOCKSIZE
PICTURES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json")  # the first that is there holds the caption
# Per row: where its picture is, a check of the tar header before it, and where its caption is; a
# row without caption has a text_size of -1.
COLUMNS = {
    "image_offset": np.int64,
    "image_size": np.int64,
    "header_crc": np.uint32,
    "text_offset": np.int64,
    "text_size": np.int64,
    "text_is_json": np.uint8,
}


@dataclass(frozen=True)
class ShardIndex:
    """The columns of `COLUMNS`, and how much was left out, by why."""

    columns: Columns
    left_out: dict[str, int]

    @property
    def rows(self) -> int:
        """How many rows the shard has."""
        return len(self.columns["image_offset"])

    def digest(self) -> str:
        """What two equal indices have in common."""
        return digest_of(self.columns)


def build_index(path: Path, name: str) -> ShardIndex:
    """The index of the tar file `path`; UsageError, with `name`, for what is no tar file."""
    with regular_file(path) as descriptor:
        size = os.fstat(descriptor).st_size
        members, left_out = _members(descriptor, size, name)
        rows = []
        for key, parts in members.items():
            picture = next((parts[ending] for ending in PICTURES if ending in parts), None)
            text = next(((parts[e], e == "json") for e in TEXTS if e in parts), None)
            if picture is None:
                left_out["without a picture"] += 1
            elif text is None and left_out["cut off"] and key == next(reversed(members)):
                continue  # its caption came after the cut, and is counted there
            else:
                (offset, length), is_json = text or ((0, -1), False)
                header = read_at(descriptor, picture[0] - BLOCK, BLOCK)
                rows.append((*picture, zlib.crc32(header), offset, length, is_json))
    columns = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
    arrays = {n: np.array(c, t) for (n, t), c in zip(COLUMNS.items(), columns, strict=True)}
    return ShardIndex(arrays, {why: count for why, count in left_out.items() if count})


def _members(
    descriptor: int, size: int, name: str
) -> tuple[dict[str, dict[str, tuple[int, int]]], Counter[str]]:
    # -> for each key its members (offset, size) by ending, in the order of the shard
    members: dict[str, dict[str, tuple[int, int]]] = {}
    left_out: Counter[str] = Counter()
    with os.fdopen(os.dup(descriptor), "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                offset = -1
                while (member := tar.next()) is not None:
                    if member.size < 0 or tar.offset <= offset:
                        raise tarfile.ReadError("a header leads backwards")
                    offset = tar.offset
                    key, ending = _split(member.name)
                    if not (member.isreg() and not member.issparse()):
                        left_out["no regular file"] += not member.isdir()
                    elif not _is_safe(member.name):
                        left_out["unsafe name"] += 1
                    elif ending not in (*PICTURES, *TEXTS):
                        continue
                    elif member.offset_data + member.size > size:
                        left_out["cut off"] += 1
                        members.pop(key, None)
                    elif ending in members.setdefault(key, {}):
                        left_out["twice there"] += 1
                    else:
                        members[key][ending] = (member.offset_data, member.size)
                # Two blocks of zeros end an archive; whatever else stands here has stopped us.
                if read_at(descriptor, tar.offset, BLOCK) != bytes(BLOCK):
                    left_out["cut off"] += 1
        except tarfile.TarError as error:
            if not members:
                raise UsageError(
                    f"{name}: is not a whole, uncompressed tar file ({error})"
                ) from None
            left_out["cut off"] = max(1, left_out["cut off"])
    return members, left_out


def _split(name: str) -> tuple[str, str]:
    # a/b.c/0001.seg.png -> a/b.c/0001, seg.png
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return folder + slash + stem, ending.lower()


def _is_safe(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def save_index(index: ShardIndex, paths: Iterable[Path], size: int, stamp: str) -> None:
    """Write `index` to the first of `paths` that can be written, as of the shard of that size and
    stamp."""
    facts = _stamp(size, stamp) | {"left_out": json.dumps(index.left_out)}
    save_columns(paths, index.columns, facts)


def load_index(path: Path, size: int, stamp: str) -> ShardIndex | None:
    """The index in `path`; None where there is none, a damaged one, or one of another shard."""
    found = load_columns(path, COLUMNS, _stamp(size, stamp))
    if found is None:
        return None
    columns, facts = found
    try:
        return ShardIndex(columns, dict(json.loads(facts["left_out"])))
    except (KeyError, ValueError, TypeError):
        return None


def is_of_shard(index: ShardIndex, path: Path) -> bool:
    """Whether the first and the last row's headers stand in the tar file as the index says."""
    headers = index.columns["image_offset"] - BLOCK
    with regular_file(path) as descriptor:
        return is_of(descriptor, index.columns["header_crc"], headers, np.full_like(headers, BLOCK))


def _stamp(size: int, stamp: str) -> Facts:
    return {"version": VERSION, "shard_size": str(size), "shard_stamp": stamp}
