"""Files and folders that are whole or not there."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from aimv2_mllm import disk
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
    assert names(tmp_path) == ["file"]


@contextmanager
def written_until_killed(what: str, path: Path) -> Iterator[Path]:
    """What another process has written of `path` with `disk`.`what`; at the end it is killed."""
    script = (
        "import sys, time; from pathlib import Path; from aimv2_mllm import disk\n"
        f"with disk.{what}(Path(sys.argv[1])) as path:\n"
        "    (path / 'file' if path.is_dir() else path).write_text('half')\n"
        "    print(path, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Path(process.stdout.readline().strip())
        finally:
            process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    path, other = tmp_path / "file[1]", tmp_path / "file[1].json"
    with written_until_killed("replaced", path) as mine, written_until_killed("replaced", other):
        replace_file(path, b"whole")
        assert mine.read_text() == "half"
        assert len(names(tmp_path)) == 3
    assert len(names(tmp_path)) == 3
    replace_file(path, b"whole")
    assert not mine.exists()
    replace_file(other, b"whole")
    assert names(tmp_path) == ["file[1]", "file[1].json"]


def test_what_another_machine_writes_stays_for_its_lock_may_not_be_seen_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with written_until_killed("replaced", tmp_path / "file") as left:
        pass
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_HERE", "another")
        replace_file(tmp_path / "file", b"whole")
    assert names(tmp_path) == ["file", left.name]


def refused(handle: int, kind: int) -> None:
    raise OSError(errno.EBADF, "Bad file descriptor")  # as NFS


def test_where_no_file_can_be_locked_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with written_until_killed("replaced", tmp_path / "file") as left:
        pass
    monkeypatch.setattr(fcntl, "flock", refused)
    replace_file(tmp_path / "file", b"whole")
    assert names(tmp_path) == ["file", left.name]


def test_a_file_taken_for_a_leftover_before_it_was_locked_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = fcntl.flock, list[Path]()

    def late(handle: int, kind: int) -> None:
        if not taken:  # another process comes before this one
            taken.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
            taken[0].unlink()
        lock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with replaced(tmp_path / "file") as unfinished:
        assert unfinished != taken[0]
        with unfinished.open() as file, pytest.raises(BlockingIOError):
            lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert names(tmp_path) == ["file"]


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


def test_a_folder_of_a_killed_process_is_written_anew_and_not_that_of_a_living_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "mine"
    with written_until_killed("new_folder", path) as left:
        with pytest.raises(UsageError, match="another process is writing it"), new_folder(path):
            pass
        assert (left / "file").read_text() == "half"
    with new_folder(path) as folder:
        assert folder == left
        assert not list(folder.iterdir())
    assert names(tmp_path) == ["mine"]


def test_a_folder_is_written_where_no_folder_can_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", refused)
    with new_folder(tmp_path / "mine"):
        pass
    assert names(tmp_path) == ["mine"]


def test_two_do_not_write_to_one_place(tmp_path: Path) -> None:
    with (
        new_folder(tmp_path / "mine"),
        pytest.raises(UsageError, match="another process is writing it"),
        new_folder(tmp_path / "mine"),
    ):
        pass
    assert names(tmp_path) == ["mine"]
