"""Tensors as files of pieces: each rank writes the rows it holds, any rank reads the rows it needs.

Owns the safetensors files of a checkpoint. A whole tensor is one piece; of a tensor that is sharded
over ranks (along its first axis, as FSDP2 does) each file has some rows, and says which.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

# The format's own names of the types.
FORMAT_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Piece(NamedTuple):
    """Rows `first`, `first + 1`, … of a tensor that has `num_rows` in all."""

    rows: Tensor
    first: int
    num_rows: int

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows; a tensor without axes is always whole."""
        return self.rows.ndim == 0 or len(self.rows) == self.num_rows


def held(tensor: Tensor) -> Piece:
    """What this rank holds of `tensor`: a live view of its own rows."""
    if not isinstance(tensor, DTensor):
        return Piece(tensor, 0, len(tensor) if tensor.ndim else 1)
    assert tensor.placements == (Shard(0),), tensor.placements
    rows, mesh = tensor.to_local(), tensor.device_mesh
    # Each rank has the same number of rows, but the last ones may have fewer or none.
    size = -(-len(tensor) // mesh.size())
    first = min(mesh.get_local_rank() * size, len(tensor))
    assert len(rows) == min(size, len(tensor) - first), (rows.shape, tensor.shape, first)
    return Piece(rows, first, len(tensor))


def to_write(tensors: Mapping[str, Tensor], *, is_first: bool) -> dict[str, Piece]:
    """What this rank writes of `tensors`: its rows of the sharded; the others if `is_first`."""
    pieces = {
        name: held(tensor)
        for name, tensor in tensors.items()
        if is_first or isinstance(tensor, DTensor)
    }
    return {name: piece for name, piece in pieces.items() if piece.is_whole or len(piece.rows)}


def write(path: Path, pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """Write `pieces` to `path` and onto the disk; its sha256 and bytes. Raises `OSError`."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in _serialised(pieces):
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
        return {"sha256": digest.hexdigest(), "bytes": file.tell()}


def _serialised(pieces: Mapping[str, Piece]) -> Iterator[Any]:
    # The library's own writer either holds two more copies of everything or hides a full disk
    # behind its own error. The format: length of the header (8 bytes, little endian), JSON header,
    # then the tensors' bytes in its order.
    # Widest types first keeps every tensor aligned.
    ordered = sorted(pieces.items(), key=lambda item: -item[1].rows.element_size())
    header: dict[str, Any] = {}
    partial = {n: [p.first, p.num_rows] for n, p in pieces.items() if not p.is_whole}
    if partial:
        header["__metadata__"] = {"rows": json.dumps(partial)}
    offset = 0
    for name, piece in ordered:
        span = [offset, offset + piece.rows.nbytes]
        header[name] = {
            "dtype": FORMAT_NAMES[piece.rows.dtype],
            "shape": list(piece.rows.shape),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, piece in ordered:
        rows = piece.rows.detach().cpu().contiguous()
        yield rows.reshape(-1).view(torch.uint8).numpy().data


class Stored(Mapping[str, Tensor]):
    """The tensors in files that `write` made, read from the disk when they are asked for.

    Raises `ValueError` when pieces of a tensor are missing or do not fit, `SafetensorError` and
    `OSError` for what is no such file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        # name -> (first row, number of rows, the open file) of its pieces, in order of the rows
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}
        wanted: dict[str, int] = {}
        for path in paths:
            file: Any = safe_open(path, framework="pt")
            partial = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():  # noqa: SIM118, it is no mapping
                shape = file.get_slice(name).get_shape()
                count = shape[0] if shape else 1
                first, total = partial.get(name, (0, count))
                if wanted.setdefault(name, total) != total:
                    raise ValueError(f"{name} has {total} rows in {path.name}, not {wanted[name]}")
                self._pieces.setdefault(name, []).append((first, count, file))
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[:2])
            ends = [0, *(first + count for first, count, _ in pieces)]
            if [first for first, _, _ in pieces] != ends[:-1] or ends[-1] != wanted[name]:
                raise ValueError(f"the pieces of {name} do not make {wanted[name]} rows")

    def __getitem__(self, name: str) -> Tensor:
        first, count, _ = self._pieces[name][-1]
        return self.rows(name, 0, first + count)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def kind(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """The shape of the whole tensor `name`, and its type."""
        pieces = self._pieces[name]
        about = pieces[0][2].get_slice(name)
        own, rows = about.get_shape(), sum(count for _, count, _ in pieces)
        dtype = next(dtype for dtype, word in FORMAT_NAMES.items() if word == about.get_dtype())
        return ((rows, *own[1:]) if own else ()), dtype

    def rows(self, name: str, first: int, end: int) -> Tensor:
        """Rows `first` to `end` - 1 of `name`; a tensor without axes has the one row 0."""
        parts = []
        for start, count, file in self._pieces[name]:
            low, high = max(first, start), min(end, start + count)
            if (low, high) == (start, start + count):
                parts.append(file.get_tensor(name))
            elif low < high:
                parts.append(file.get_slice(name)[low - start : high - start])
        if not parts:  # a rank that holds nothing of a short tensor
            parts = [self._pieces[name][0][2].get_slice(name)[0:0]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def fill(target: Tensor, stored: Stored, name: str) -> None:
    """Copy into `target`, of the shape and type of `name`, the rows that this rank holds of it."""
    piece = held(target)
    count = len(piece.rows) if piece.rows.ndim else 1
    piece.rows.copy_(stored.rows(name, piece.first, piece.first + count))
