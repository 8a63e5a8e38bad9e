"""Files that are whole or not there, also after a power cut; the words for a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def replace_file(path: Path, content: bytes) -> None:
    """Replace `path` with `content`: a reader sees the old or the new. Raises `OSError`."""
    unfinished = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        write_synced(unfinished, content)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
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
