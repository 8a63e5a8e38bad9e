"""Files and folders that are whole or not there, also after a power cut; the words for a full disk.

What is unfinished has a name of its own, which ends in `.part`.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from aimv2_mllm.errors import UsageError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Another file to write, which takes the place of `path` when all is well: a reader sees the
    old or the new. Raises `OSError`."""
    unfinished = path.with_name(f"{path.name}.{uuid4().hex[:8]}.part")  # ranks may write it at once
    try:
        yield unfinished
        put(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """The same with what to write. Raises `OSError`."""
    with replaced(path) as unfinished:
        unfinished.write_bytes(content)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to write, which becomes `destination` when all is well and is gone when not.

    `OSError` where the disk refuses, UsageError while another process writes it.
    """
    unfinished = destination.with_name(f".{destination.name}.part")
    unfinished.mkdir(parents=True, exist_ok=True)
    with _held(unfinished, destination):
        try:
            for left in unfinished.iterdir():  # by a process that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield unfinished
            for file in (path for path in unfinished.rglob("*") if path.is_file()):
                file.chmod(0o644)  # safetensors writes for the owner alone
                sync(file)
            put(unfinished, destination)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _held(unfinished: Path, destination: Path) -> Iterator[None]:
    """Hold the folder `unfinished` against a second process, as long as this one lives."""
    import fcntl  # late: whoever only saves weights may have a system without it

    handle = os.open(unfinished, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{destination}: another process is writing it; wait for that, or give a new folder"
            ) from None
        except OSError:  # a network drive locks files and no folders
            pass
        yield
    finally:
        os.close(handle)


def put(unfinished: Path, path: Path) -> None:
    """Give what is whole, a file or a folder, its name, on the disk too. Raises `OSError`."""
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write `content` to `path` and bring it onto the disk. Raises `OSError`."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Bring the file or the folder `path` onto the disk. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def why(error: OSError, folder: Path) -> str:
    """What the system says of `folder`, and how much is free there."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**20
    return f"{error.strerror} in {folder}, where {free:.1f} MiB are free"


def remedy(error: OSError) -> str:
    """What to do about a disk that refused."""
    what = "free some space there" if error.errno in NO_SPACE else "make that folder writable"
    return f"{what} and run the same command"
