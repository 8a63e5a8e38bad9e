"""Where each row of a JSON file lies, so that one row is read without the others.

Owns the index of a JSON list or of JSON lines: built in one pass that keeps nothing else in memory,
and kept in the sidecar `NAME.index.safetensors`, or in the user's cache where that cannot be
written. It says which file it is of, and is built anew when that file has changed. A line that is
no JSON is a row all the same, unusable when it is read; a list that is broken is refused, for
nobody knows where its next row begins.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from aimv2_mllm.data.cache import user_cache
from aimv2_mllm.data.files import Unusable, read_at, regular_file
from aimv2_mllm.data.shard_index import INDEX_ENDING
from aimv2_mllm.errors import RunFailed, UsageError

VERSION = "1"
MAX_ROW_BYTES = 16 * 2**20  # of one row's text
PIECE = 4 * 2**20  # bytes read at a time
LOOKED_AT = 100  # rows of which at least one must be JSON
BLANK = b" \t\r\n"
COLUMNS = {"offset": np.int64, "size": np.int64, "crc": np.uint32}
Row = tuple[int, int, int]  # offset, size, CRC-32


@dataclass(frozen=True)
class JsonRows:
    """The rows of a JSON file: `columns` are those of `COLUMNS`, (rows,) each."""

    file: Path
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["offset"])

    def digest(self) -> str:
        """What two files with equal rows have in common."""
        content = b"".join(self.columns[name].tobytes() for name in COLUMNS)
        return hashlib.sha256(content).hexdigest()[:32]

    def read(self, row: int) -> Any:
        """The value of a row; `Unusable` where it is not JSON.

        RunFailed when the file is not what it was when it was opened.
        """
        offset, size, crc = (int(self.columns[name][row]) for name in COLUMNS)
        try:
            with regular_file(self.file) as descriptor:
                content = read_at(descriptor, offset, size)
        except OSError as error:
            raise RunFailed(f"{self.file}: cannot be read any more ({error.strerror})") from None
        if zlib.crc32(content) != crc:
            raise RunFailed(
                f"{self.file}: is not the file that was opened: it changed while the run was"
                " reading it; put it back and run the same command again"
            )
        try:
            return json.loads(content)
        except UnicodeDecodeError as error:
            raise Unusable("not_utf8", f"is not UTF-8 (byte {error.start})") from None
        except (ValueError, RecursionError) as error:
            raise Unusable("not_json", f"is not JSON ({error})") from None


def open_rows(file: Path) -> JsonRows:
    """The rows of the JSON list, or of the JSON lines, in `file`; from its index where it has one.

    UsageError where it cannot be read or is neither.
    """
    try:
        with regular_file(file) as descriptor:
            facts = os.fstat(descriptor)
            stamp = {
                "version": VERSION,
                "size": str(facts.st_size),
                "mtime": str(facts.st_mtime_ns),
            }
            sidecars = _sidecars(file)
            for sidecar in sidecars:
                found = _loaded(sidecar, file, stamp)
                if found is not None and _is_of(found, descriptor):
                    return found
            rows = JsonRows(file, _built(file, descriptor, facts.st_size))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from None
    _demand_json(rows)
    for sidecar in sidecars:
        with suppress(OSError):
            sidecar.parent.mkdir(parents=True, exist_ok=True)
            _save(rows, sidecar, stamp)
            break
    return rows


def _built(file: Path, descriptor: int, size: int) -> dict[str, np.ndarray]:
    rows: list[Row] = []
    with (
        os.fdopen(os.dup(descriptor), "rb") as stream,
        tqdm(
            desc=f"indexing {file.name}",
            total=size,
            unit="B",
            unit_scale=True,
            delay=1,
            disable=None,
        ) as progress,
    ):
        stream.seek(0)
        begin = 3 if stream.read(3) == b"\xef\xbb\xbf" else 0  # a byte order mark
        stream.seek(begin)
        first = stream.read(1)
        while first and first in BLANK:
            first = stream.read(1)
        is_list = first == b"["
        stream.seek(stream.tell() if is_list else begin)
        for row in _elements(stream, file) if is_list else _lines(stream, file):
            rows.append(row)
            progress.update(row[0] + row[1] - progress.n)
    columns = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
    return {n: np.array(c, t) for (n, t), c in zip(COLUMNS.items(), columns, strict=True)}


def _lines(stream: BinaryIO, file: Path) -> Iterator[Row]:
    offset = stream.tell()
    while line := stream.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise UsageError(
                f"{file}: byte {offset:,}: a line is longer than {MAX_ROW_BYTES:,} bytes"
            )
        if line.strip():
            yield offset, len(line), zlib.crc32(line)
        offset += len(line)


def _elements(stream: BinaryIO, file: Path) -> Iterator[Row]:
    """The elements of the list after whose bracket `stream` stands."""
    # As Latin-1 a byte is a character, so that places in the text are places in the file; all
    # that JSON itself is made of is ASCII.
    decoder = json.JSONDecoder()
    offset, text, begin = stream.tell(), "", 0  # text[0] lies at `offset`, the rest begins at begin
    count, is_last, needs_more = 0, False, True
    while True:
        if needs_more:
            offset, text, begin = offset + begin, text[begin:], 0
            piece = stream.read(PIECE)
            is_last, text = not piece, text + piece.decode("latin-1")
        here = begin
        while here < len(text) and text[here] in " \t\r\n":
            here += 1
        if count and here < len(text) and text[here] == ",":
            here += 1
            while here < len(text) and text[here] in " \t\r\n":
                here += 1
        elif here < len(text) and text[here] == "]":
            return
        elif count and here < len(text):
            raise _broken(file, count, offset + here, "there is no comma before it")
        try:
            end = decoder.raw_decode(text, here)[1] if here < len(text) else len(text)
            fault = "the list has no end"
        except (ValueError, RecursionError) as error:
            end, fault = len(text), getattr(error, "msg", "is nested too deep")
        # What ends where the piece ends may go on after it: 12 may be 123, and 1.5e- be 1.5e-3.
        needs_more = end >= len(text) or (not is_last and len(text) - end < 3)
        if needs_more:
            if is_last or len(text) - begin > MAX_ROW_BYTES + PIECE:
                raise _broken(file, count, offset + here, fault)
            continue
        content = text[here:end].encode("latin-1")
        yield offset + here, len(content), zlib.crc32(content)
        count, begin = count + 1, end


def _broken(file: Path, count: int, place: int, fault: str) -> UsageError:
    return UsageError(
        f"{file}: is a JSON list that is broken in its element {count} (byte {place:,}): {fault};"
        " mend it, or write one mapping a line, where a bad row is skipped"
    )


def _demand_json(rows: JsonRows) -> None:
    """UsageError for a file of which none of the first rows is JSON."""
    if not len(rows):
        raise UsageError(f"{rows.file}: has no rows; it is a JSON list or a JSON mapping a line")
    fault = ""
    for row in range(min(len(rows), LOOKED_AT)):
        try:
            rows.read(row)
        except Unusable as error:
            fault = fault or str(error)
        else:
            return
    raise UsageError(
        f"{rows.file}: is neither a JSON list nor a JSON mapping a line: its first line {fault}"
    )


def _sidecars(file: Path) -> list[Path]:
    digest = hashlib.sha256(os.path.abspath(file).encode()).hexdigest()[:16]
    return [
        file.with_name(f"{file.name}{INDEX_ENDING}"),
        user_cache() / f"{digest}-{file.name[-100:]}{INDEX_ENDING}",
    ]


def _save(rows: JsonRows, path: Path, stamp: dict[str, str]) -> None:
    unfinished = path.with_name(f"{path.name}.{uuid4().hex}.part")  # ranks may write it together
    try:
        unfinished.write_bytes(save(rows.columns, stamp | {"digest": rows.digest()}))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _loaded(path: Path, file: Path, stamp: dict[str, str]) -> JsonRows | None:
    """The index in `path`; None where there is none, a damaged one, or one of another file."""
    try:
        if not path.is_file():
            return None
        with safe_open(path, "np") as index:
            facts = index.metadata() or {}
            columns = {name: index.get_tensor(name) for name in COLUMNS}
    except (OSError, SafetensorError):
        return None
    rows = JsonRows(file, columns)
    shapes = {name: (column.shape, column.dtype) for name, column in columns.items()}
    is_whole = shapes == {name: ((len(rows),), np.dtype(kind)) for name, kind in COLUMNS.items()}
    return rows if is_whole and facts == stamp | {"digest": rows.digest()} else None


def _is_of(rows: JsonRows, descriptor: int) -> bool:
    """Whether the first and the last row stand where the index says."""
    return all(
        zlib.crc32(
            read_at(descriptor, int(rows.columns["offset"][row]), int(rows.columns["size"][row]))
        )
        == rows.columns["crc"][row]
        for row in {0, len(rows) - 1}
        if len(rows)
    )
