"""Tables of questions about pictures, as a spreadsheet writes them: CSV in UTF-8, a row a question.

Owns which columns are needed and what stands between them. Refuses a table that lacks one, a row
with more or fewer fields than the first line, and other codes than UTF-8.
"""

import csv
import hashlib
import io
from pathlib import Path

from aimv2_mllm.data.files import Unusable, read_whole
from aimv2_mllm.errors import UsageError, nearest

COLUMNS = ("image", "question", "answer")
MAX_TABLE_BYTES = 256 * 2**20  # it is held in memory


class QuestionTable:
    """The rows of a CSV file; UsageError where it is none, or lacks a column."""

    digest: str  # changes with the file

    def __init__(self, file: Path) -> None:
        self._file, self._rows, self._lines = file, list[list[str]](), list[int]()
        try:
            content = read_whole(file, MAX_TABLE_BYTES)
            text = content.decode("utf-8-sig")
        except Unusable as error:
            raise UsageError(
                f"{error}; it is a table of the columns {', '.join(COLUMNS)}"
            ) from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{file}: is not UTF-8 (byte {error.start}); save it as CSV UTF-8"
            ) from None
        self.digest = hashlib.sha256(content).hexdigest()
        self._names = self._parsed(text)
        missing = [name for name in COLUMNS if name not in self._names]
        if missing:
            near = nearest(missing[0], self._names)
            raise UsageError(
                f"{file}: its first line names no column {missing[0]}; it has"
                f" {', '.join(self._names) or 'none'}, and {', '.join(COLUMNS)} are needed{near}"
            )

    def _parsed(self, text: str) -> list[str]:
        """The names of the first line in small letters; the other lines become rows."""
        # Spreadsheets of many countries write ; for the comma that is theirs in numbers.
        heading = text.partition("\n")[0]
        delimiter = max(",;\t", key=heading.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            names = [name.strip().lower() for name in next(reader, [])]
            for row in reader:
                if any(field.strip() for field in row):
                    self._rows.append(row)
                    self._lines.append(reader.line_num)
        except csv.Error as error:
            raise UsageError(f"{self._file}:{reader.line_num}: is no CSV ({error})") from None
        return names

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, row: int) -> str:
        """Where the row is, in words."""
        return f"{self._file}:{self._lines[row]}"

    def fields(self, row: int) -> dict[str, str]:
        """What the row says, by the names of the first line in small letters."""
        fields = self._rows[row]
        if len(fields) != len(self._names):
            said = f"has {len(fields)} fields and not {len(self._names)}"
            raise Unusable("odd_row", f"{said}; quote what has a comma in it")
        return dict(zip(self._names, map(str.strip, fields), strict=True))
