"""A shard of features: a file of safetensors with a tensor (N, D) for each picture, named by its
key in hexadecimal, and in the metadata the checksum of each."""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from aimv2_mllm.data.files import read_at, regular_file

CHECKSUMS = "crc32"  # in the metadata: a JSON mapping from key to the checksum of the row's bytes
KEPT_AS = {"F32": torch.float32, "BF16": torch.bfloat16}  # by the names of the format


class Damaged(Exception):
    """A shard, or a row of it, is not as it was written."""


class Shard(NamedTuple):
    """Where the rows of a shard lie."""

    path: Path
    size: int  # bytes
    dtype: torch.dtype
    shape: tuple[int, ...]  # of a row
    rows: dict[bytes, tuple[int, int]]  # by key: where its bytes begin, and their checksum

    def row(self, key: bytes) -> Tensor:
        """The features (N, D) of a picture; `Damaged` where they are not as they were written,
        OSError without the file."""
        begin, checksum = self.rows[key]
        count = self.dtype.itemsize * math.prod(self.shape)
        # Nothing stays open, for there may be more shards than a process may have files.
        with regular_file(self.path) as descriptor:
            values = bytearray(read_at(descriptor, begin, count))  # torch wants to write to it
        if zlib.crc32(values) != checksum:
            raise Damaged("a checksum does not agree")
        return torch.frombuffer(values, dtype=self.dtype).view(self.shape)


def picture_key(content: bytes, aspect: str) -> bytes:
    """The key of an encoded picture that is made square as `aspect` says."""
    return hashlib.sha256(aspect.encode() + b"\0" + content).digest()


def serialised(rows: Mapping[bytes, Tensor]) -> bytes:
    """A shard of these features."""
    rows = {key: row.contiguous() for key, row in rows.items()}
    sums = {key.hex(): zlib.crc32(row.view(torch.uint8).numpy().data) for key, row in rows.items()}
    named = {key.hex(): row for key, row in rows.items()}
    content: bytes = safetensors.torch.save(named, {CHECKSUMS: json.dumps(sums)})
    return content


def read_shard(path: Path) -> Shard:
    """What the header of the file at `path` says; `Damaged` where the file is not whole, OSError
    where there is none."""
    with regular_file(path) as descriptor:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(read_at(descriptor, 0, 8), "little")
        header = read_at(descriptor, 8, min(length, size))
    try:
        said = json.loads(header)
        sums = json.loads(said.pop("__metadata__")[CHECKSUMS])
        [(dtype, shape)] = {(one["dtype"], tuple(one["shape"])) for one in said.values()}
        start = 8 + length
        rows = {bytes.fromhex(k): (start + v["data_offsets"][0], sums[k]) for k, v in said.items()}
        whole = start + max(one["data_offsets"][1] for one in said.values())
        if size != whole:
            raise Damaged(f"it has {size:,} bytes of {whole:,}")
        return Shard(path, size, KEPT_AS[dtype], shape, rows)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise Damaged("its header is no shard's") from None


def remove(path: Path, why: object, tell: Callable[[str], None]) -> None:
    """Remove a damaged shard, and tell of it, once of several processes."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    tell(f"{path}: removed, and what it held is computed again ({why})")
