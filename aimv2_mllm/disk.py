"""Files and folders that are whole or not there, also after a power cut; the words for a full disk.

What is unfinished has a name of its own, which ends in `.part`.
"""

import errno
import glob
import os
import platform
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4

from aimv2_mllm.errors import UsageError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HERE = f"{zlib.crc32(platform.node().encode()):08x}"  # this machine, in names of files
_Holder = Literal["we", "another", "unknown"]  # of a file that is being written


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Another file to write, which takes the place of `path` when all is well: a reader sees the
    old or the new. What killed processes left of it is removed. Raises `OSError`."""
    _remove_leftovers(path)
    while True:
        unfinished = path.with_name(f"{path.name}.{_HERE}-{uuid4().hex[:8]}.part")
        with _held(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL) as holder:
            if holder == "another":  # who removes leftovers came before it was locked
                continue
            try:
                yield unfinished
                put(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
            return


def _remove_leftovers(path: Path) -> None:
    """Remove what processes of this machine that are no more have left unfinished of `path`.

    Another machine's stay, for the lock of one that lives may not be seen here.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.{_HERE}-*.part"):
        with suppress(OSError), _held(left) as holder:
            if holder == "we":
                left.unlink()


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
    with _held(unfinished, os.O_RDONLY) as holder:
        if holder == "another":
            raise UsageError(
                f"{destination}: another process is writing it; wait for that, or give a new folder"
            )
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
def _held(path: Path, flags: int = os.O_RDWR) -> Iterator[_Holder]:
    """Open the file or folder `path` with `flags` and hold it, as long as this process lives; who
    holds it."""
    handle = os.open(path, flags, 0o666)
    try:
        yield _holder(handle, path)
    finally:
        os.close(handle)


def _holder(handle: int, path: Path) -> _Holder:
    import fcntl  # late: whoever only loads weights may have a system without it

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it until now may have renamed or removed it.
        return "we" if os.path.samestat(os.fstat(handle), path.stat()) else "another"
    except (BlockingIOError, FileNotFoundError):
        return "another"
    except OSError:  # some network drives lock files and no folders, some nothing
        return "unknown"


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
