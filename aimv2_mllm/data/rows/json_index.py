"""Where each row of a JSON file lies, so that one row is read without the others.

Owns the index of a JSON list or of JSON lines: built in one pass that keeps nothing else in memory,
and kept in the sidecar `NAME.index.safetensors`, or in the user's cache where that cannot be
written. It says which file it is of, and is built anew when that file has changed. What is no JSON
is a row all the same, unusable when it is read; refused is a list of which nobody knows where the
next row begins.
"""

import hashlib
import json
import os
import re
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from aimv2_mllm.data.files import Unusable, read_at, regular_file
from aimv2_mllm.data.rows.columns import (
    INDEX_ENDING,
    Columns,
    digest_of,
    is_of,
    load_columns,
    save_columns,
)
from aimv2_mllm.data.rows.local_copies import user_cache
from aimv2_mllm.errors import RunFailed, UsageError

VERSION = "1"
MAX_ROW_BYTES = 16 * 2**20  # of one row's text
PIECE = 4 * 2**20  # bytes read at a time
LOOKED_AT = 100  # rows of which at least one must be JSON
BLANK = b" \t\r\n"
STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
PLAIN = rb'[^"{}\[\]]++|' + STRING
NESTED = rb"[\[{](?:" + PLAIN + rb")*+[}\]]"  # a list or mapping of plain values
for _ in range(2):  # and of such: as deep as a row usually is, which is then passed over at once
    NESTED = rb"[\[{](?:" + PLAIN + rb"|" + NESTED + rb")*+[}\]]"
# Up to the next place where a list or mapping begins, goes on or ends.
PLACE = re.compile(rb'(?:[^"{}\[\],]++|' + STRING + rb"|" + NESTED + rb")*+([{}\[\],])", re.DOTALL)
COLUMNS = {"offset": np.int64, "size": np.int64, "crc": np.uint32}
Row = tuple[int, int, int]  # offset, size, CRC-32


@dataclass(frozen=True)
class JsonRows:
    """The rows of a JSON file: `columns` are those of `COLUMNS`."""

    file: Path
    columns: Columns

    def __len__(self) -> int:
        return len(self.columns["offset"])

    def digest(self) -> str:
        """What two files with equal rows have in common."""
        return digest_of(self.columns)

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
                if (found := load_columns(sidecar, COLUMNS, stamp)) is not None:
                    columns, _ = found
                    if is_of(descriptor, columns["crc"], columns["offset"], columns["size"]):
                        return JsonRows(file, columns)
            rows = JsonRows(file, _built(file, descriptor, facts.st_size))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from None
    _demand_json(rows)
    save_columns(sidecars, rows.columns, stamp)
    return rows


def _built(file: Path, descriptor: int, size: int) -> Columns:
    columns = [array("q") for _ in COLUMNS]
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
            for column, value in zip(columns, row, strict=True):
                column.append(value)
            progress.update(row[0] + row[1] - progress.n)
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
    offset, text = stream.tell(), b""  # text[0] lies at `offset`
    begin = here = depth = count = 0  # text[begin] begins an element, text[here] is next
    while True:
        found = PLACE.match(text, here)
        if found is None:
            piece = stream.read(PIECE)
            if not piece or len(text) - begin > MAX_ROW_BYTES:
                raise UsageError(
                    f"{file}: is a JSON list without an end: nothing closes its element {count}"
                    f" (byte {offset + begin:,}); mend it, or write a mapping a line"
                )
            offset, text, here, begin = offset + begin, text[begin:] + piece, here - begin, 0
            continue
        mark, here = found[1], found.end()
        if mark in b"{[":
            depth += 1
        elif depth:
            depth -= mark in b"}]"
        else:
            content = text[begin : here - 1]
            if mark == b"]" and not count and not content.strip():
                return
            lead = len(content) - len(content.lstrip())
            content = content.strip()
            yield offset + begin + lead, len(content), zlib.crc32(content)
            if mark == b"]":
                return
            begin, count = here, count + 1


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
