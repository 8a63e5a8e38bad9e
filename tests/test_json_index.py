"""The index of a JSON file: every row where it is, kept in a sidecar, built anew if need be."""

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.rows import json_index
from aimv2_mllm.data.rows.json_index import open_rows
from aimv2_mllm.errors import RunFailed, UsageError

ROWS = [
    {"id": 1, "text": 'a "quoted" ] , [ { } \\ word'},
    {"id": "2", "text": "é 数 🙂", "deep": [[{"a": [1, 2, {}]}]]},
    "a text",
    123456789,
    -1.5e10,
    None,
    [],
    {"id": 3, "text": "x" * 500},
]


def written(path: Path, rows: list[Any], style: str) -> Path:
    ascii_only = style != "lines, UTF-8"
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    text = {
        "list": json.dumps(rows),
        "list, indented": json.dumps(rows, indent=2, ensure_ascii=False),
        "list, spread": "\ufeff\n [ " + " \r\n,\t ".join(lines) + "\n ]\n",
        "lines": "\n".join(lines),
        "lines, UTF-8": "\ufeff" + "\r\n\n".join(lines) + "\r\n",
    }[style]
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("piece", [1, 7, 64, 2**22])
@pytest.mark.parametrize(
    "style", ["list", "list, indented", "list, spread", "lines", "lines, UTF-8"]
)
def test_each_row_is_read_as_json_has_it(
    tmp_path: Path, style: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_index, "PIECE", piece)
    file = written(tmp_path / "rows.json", ROWS, style)
    for rows in (open_rows(file), open_rows(file)):  # built, and from its sidecar
        assert len(rows) == len(ROWS)
        assert [rows.read(row) for row in reversed(range(len(ROWS)))] == ROWS[::-1]


def test_the_index_is_kept_and_built_anew_when_the_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "rows.json", ROWS, "list")
    first = open_rows(file)
    sidecar = tmp_path / "rows.json.index.safetensors"
    whole = sidecar.read_bytes()

    def forbidden(*_: Any) -> Any:
        raise AssertionError("built again")

    monkeypatch.setattr(json_index, "_built", forbidden)
    assert open_rows(file).digest() == first.digest()
    monkeypatch.undo()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + b"x", b""):
        sidecar.write_bytes(damaged)
        assert open_rows(file).digest() == first.digest()
    written(file, [{"id": 9}, *ROWS], "list")
    with pytest.raises(RunFailed, match="changed while the run was reading it"):
        [first.read(row) for row in range(len(ROWS))]
    assert open_rows(file).read(0) == {"id": 9}


def test_a_folder_that_cannot_be_written_leaves_the_index_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = written(tmp_path / "rows.json", ROWS, "list")
    (tmp_path / "rows.json.index.safetensors").mkdir()  # in its way, for root too
    assert len(open_rows(file)) == len(ROWS)
    assert len([*(tmp_path / "cache").rglob("*rows.json.index.safetensors")]) == 1
    monkeypatch.setattr(json_index, "_built", None)
    assert len(open_rows(file)) == len(ROWS)


def test_a_line_that_is_no_json_is_a_row_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"id": 1}\n{"id": 2\n{"id": "\xff"}\n{"id": 4}\n' + b"[" * 100_000)
    rows = open_rows(file)
    assert [rows.read(row) for row in (0, 3)] == [{"id": 1}, {"id": 4}]
    for row, reason in ((1, "not_json"), (2, "not_utf8"), (4, "not_json")):
        with pytest.raises(Unusable) as error:
            rows.read(row)
        assert error.value.reason == reason


def test_an_element_that_is_no_json_is_a_row_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[{"id": 1}, {"id": oops}, {"id": 3} {"id": 4}, , {"id": 5}, ]')
    rows = open_rows(file)
    assert [rows.read(row) for row in (0, 4)] == [{"id": 1}, {"id": 5}]
    for row in (1, 2, 3, 5):
        with pytest.raises(Unusable, match="is not JSON"):
            rows.read(row)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[1, 2", "nothing closes its element 1 .byte 3."),
        ('[{"a": "', "nothing closes its element 0"),
        ("[" * 100_000, "nothing closes its element 0"),
        ('[{"a": 1} {"b": 2}]', "its first line is not JSON"),
        ("", "has no rows"),
        ("[]", "has no rows"),
        ("\n \n", "has no rows"),
        ('{\n  "a": 1\n}\n', "is neither a JSON list nor a JSON mapping a line"),
        ("id,image\n1,a.jpg\n", "is neither a JSON list"),
    ],
)
def test_a_file_that_is_no_list_and_no_lines_is_refused(
    tmp_path: Path, content: str, text: str
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=text) as error:
        open_rows(file)
    assert str(file) in str(error.value)


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        open_rows(tmp_path / "none.json")
    with pytest.raises(UsageError, match="is not a regular file"):
        open_rows(tmp_path)


def test_a_large_list_is_opened_without_holding_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_index, "PIECE", 2**16)
    random.seed(0)
    rows = [{"id": number, "text": random.randbytes(1000).hex()} for number in range(3000)]
    file = written(tmp_path / "rows.json", rows, "list")  # 6 MB
    tracemalloc.start()
    opened = open_rows(file)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened.read(2999) == rows[2999]
    assert most < 2 * 2**20
