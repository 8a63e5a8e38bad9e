"""Where questions to a model come from: JSON lines, a folder with a table, the library `datasets`.

Owns where rows and pictures lie; what a row must hold is `asked`'s.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from aimv2_mllm.data.files import MAX_PICTURE_BYTES, Unusable, below, read_whole
from aimv2_mllm.data.handwriting import held_out, scenes
from aimv2_mllm.data.rows.json_index import open_rows
from aimv2_mllm.data.rows.question_tables import QuestionTable
from aimv2_mllm.data.rows.tables import load_table, picture_bytes
from aimv2_mllm.errors import UsageError, show
from aimv2_mllm.recipe.data import DatasetsSource

TABLE, HANDWRITING = "questions.csv", "handwriting"
GIVE = (
    "give a file of JSON lines with image, question and answers, a folder with questions.csv, a "
    "dataset of the `datasets` library, or handwriting"
)
NUM_QUESTIONS, SHEET_SIZE = 1400, 336  # of the embedded world; pixels, the side of a sheet


class AskedSource(Protocol):
    """Where rows come from."""

    digest: str  # changes when other rows would be read

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """Where the row is, in words."""

    def fields(self, row: int) -> Mapping[str, Any]:
        """What the row says, by the data's own names; `Unusable` where it cannot be read."""

    def picture(self, value: Any) -> bytes:
        """The encoded picture of a field; `Unusable` where there is none."""

    def identity(self, value: Any) -> str:
        """What that picture is known by: changes with its content, not with its name."""


class _Files:
    """Pictures that are files below `root`."""

    def __init__(self, root: Path) -> None:
        self._root, self._known = root, dict[Path, str]()

    def picture(self, value: Any) -> bytes:
        if not isinstance(value, str):
            raise Unusable("odd_row", f"image is {show(value)}, and not a picture's path")
        return read_whole(below(self._root, value), MAX_PICTURE_BYTES)

    def identity(self, value: Any) -> str:
        if not isinstance(value, str):
            raise Unusable("odd_row", f"image is {show(value)}, and not a picture's path")
        path = below(self._root, value)
        if not path.is_file():
            raise Unusable("unreadable", f"there is no picture {value} in {self._root}")
        if path not in self._known:
            self._known[path] = hashlib.sha256(read_whole(path, MAX_PICTURE_BYTES)).hexdigest()
        return self._known[path]


class AskedLines(_Files):
    """A JSON mapping a line, or a list of them; pictures are named from `root`."""

    def __init__(self, file: Path, root: Path) -> None:
        if not root.is_dir():
            raise UsageError(f"{root}: there is no such folder (--root)")
        super().__init__(root)
        self._rows = open_rows(file)
        self.digest = self._rows.digest()

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, row: int) -> str:
        return f"{self._rows.file}, row {row}"

    def fields(self, row: int) -> Mapping[str, Any]:
        found = self._rows.read(row)
        if not isinstance(found, dict):
            raise Unusable("odd_row", f"is no mapping but {show(found)}")
        return found


class AskedTable(_Files):
    """A folder of pictures with the table questions.csv."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._table = QuestionTable(folder.expanduser() / TABLE)
        self.digest = self._table.digest

    def __len__(self) -> int:
        return len(self._table)

    def name(self, row: int) -> str:
        return self._table.name(row)

    def fields(self, row: int) -> Mapping[str, Any]:
        return self._table.fields(row)


class Dataset:
    """The rows of a data set of the library `datasets`, `org/name@config` where it has several."""

    def __init__(self, dataset: str, split: str, image: str) -> None:
        name, _, config = (dataset, "", "") if os.path.isdir(dataset) else dataset.partition("@")
        self._dataset = dataset
        named = DatasetsSource(dataset=name, config=config or None, split=split, image=image)
        self._rows, self.digest = load_table(named, {"image": image})

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, row: int) -> str:
        return f"{self._dataset}, row {row}"

    def fields(self, row: int) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._rows[row]
        return found

    def picture(self, value: Any) -> bytes:
        return picture_bytes(value)

    def identity(self, value: Any) -> str:
        return hashlib.sha256(picture_bytes(value)).hexdigest()


class Sheets:
    """Questions about held-out sheets of the world of handwriting, of each kind as many."""

    digest = f"{HANDWRITING} 0"

    def __init__(self) -> None:
        self._questions = held_out.held_out_questions(0, NUM_QUESTIONS)

    def __len__(self) -> int:
        return len(self._questions)

    def name(self, row: int) -> str:
        return f"{HANDWRITING}, question {row}"

    def fields(self, row: int) -> Mapping[str, Any]:
        asked = self._questions[row]
        return {
            "image": str(asked.sheet),
            "question": asked.text,
            "answers": [asked.truth],
            "type": asked.kind,
        }

    def picture(self, value: Any) -> bytes:
        stream = io.BytesIO()
        sheet = scenes.render(held_out.held_out_sheet(0, int(value)), SHEET_SIZE)
        Image.fromarray(sheet).save(stream, "PNG", compress_level=1)
        return stream.getvalue()

    def identity(self, value: Any) -> str:
        return str(value)


def open_asked(data: str, root: str | None, split: str, image: str) -> AskedSource:
    """The source that `data` names; UsageError where there is none."""
    path = Path(data).expanduser()
    if data == HANDWRITING and not path.exists():
        return Sheets()
    if path.is_file():
        return AskedLines(path, Path(root).expanduser() if root else path.parent)
    if root is not None:
        raise UsageError(f"--root is for a file of JSON lines, and {data} is none")
    if (path / TABLE).is_file():
        return AskedTable(path)
    if path.is_dir() or (data.count("/") == 1 and not os.path.lexists(data)):
        return Dataset(data, split, image)
    raise UsageError(f"{data}: there is no such file or folder; {GIVE}")
