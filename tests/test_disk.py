"""Files and folders that are whole or not there."""

import errno
import fcntl
from contextlib import suppress
from pathlib import Path

import pytest

from aimv2_mllm.disk import new_folder, replace_file, replaced
from aimv2_mllm.errors import UsageError


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    with suppress(KeyError), replaced(path) as unfinished:
        unfinished.write_bytes(b"ne")
        raise KeyError
    assert path.read_bytes() == b"old"
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    left = tmp_path / ".mine.part" / "below"
    left.mkdir(parents=True)
    (left / "half").write_text("of a process that was killed")
    with suppress(KeyError), new_folder(tmp_path / "mine") as folder:
        (folder / "file").write_text("")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "mine") as folder:
        (folder / "file").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def test_a_folder_is_written_where_no_folder_can_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(handle: int, kind: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS

    monkeypatch.setattr(fcntl, "flock", refused)
    with new_folder(tmp_path / "mine"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_two_do_not_write_to_one_place(tmp_path: Path) -> None:
    with (
        new_folder(tmp_path / "mine"),
        pytest.raises(UsageError, match="another process is writing it"),
        new_folder(tmp_path / "mine"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
