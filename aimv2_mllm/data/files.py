"""Bytes of files that somebody else wrote: regular files only, never larger than expected.

Owns how a corpus file is opened, how a path inside a corpus is held below its root, and how a list
of shards is written in short. Never waits: a pipe or device is refused without being read.
"""

import errno
import glob
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

from aimv2_mllm.errors import RunFailed, UsageError, nearest

MAX_PICTURE_BYTES = 256 * 2**20  # of one encoded picture
MAX_TEXT_BYTES = 2**20  # of one caption with what stands beside it
MAX_SHARDS = 1_000_000  # that a pattern may mean
Later = Callable[[], bytes]  # an encoded picture, read when it is called; then it may be `Unusable`


class Unusable(ValueError):
    """A row that cannot be used: `reason` is a key under which such rows are counted."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return Unusable, (self.reason, str(self))


@contextmanager
def regular_file(path: Path) -> Iterator[int]:
    """A descriptor for reading the regular file `path`.

    OSError where there is none, UsageError for a folder, a pipe or a device; waits for neither.
    """
    # Opening a pipe waits for its writer, unless told not to.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UsageError(f"{path}: is not a regular file (a folder, pipe or device)")
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """The `size` bytes at `offset`; fewer only where the file ends."""
    parts, left = [], size
    while left:  # one call reads 2 GiB at most, and may be cut short
        part = os.pread(descriptor, left, offset + size - left)
        if not part:
            break
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def read_whole(path: Path, most: int) -> bytes:
    """A file's content; `Unusable` where it is missing, no regular file, or above `most` bytes.

    RunFailed where this process may open no more files.
    """
    with _readable(path, most) as (descriptor, size):
        return read_at(descriptor, 0, size)


def read_later(path: Path, most: int) -> Later:
    """What reads a file's content; `Unusable` already now where `read_whole` would not read it."""
    with _readable(path, most):
        return partial(read_whole, path, most)


@contextmanager
def _readable(path: Path, most: int) -> Iterator[tuple[int, int]]:
    """A descriptor of the file and its size, in bytes."""
    try:
        with regular_file(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > most:
                raise Unusable("too_large", f"{path}: has {size:,} bytes, {most:,} are the most")
            yield descriptor, size
    except UsageError as error:
        raise Unusable("unreadable", str(error)) from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # another row would do no better
            raise RunFailed(
                f"{path}: cannot be read ({error.strerror}): let this process have more, as by"
                " ulimit -n 65536, and run the same command again"
            ) from None
        raise Unusable("unreadable", f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        if isinstance(error, Unusable):
            raise
        raise Unusable("unreadable", f"{str(path)!r}: is no path ({error})") from None


def below(root: Path, said: str) -> Path:
    """The path `said` under `root`; `Unusable` when it leads out, also by way of a link."""
    try:
        path = (root / said).resolve()
        inside = path.is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a ring of links
        raise Unusable("unreadable", f"{said!r}: is no path ({error})") from None
    if not inside:
        raise Unusable("outside_root", f"{said}: leads out of {root}")
    return path


def as_text(content: bytes, name: str) -> str:
    """UTF-8 as text; `Unusable` for anything else."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{name}: the caption is not UTF-8 (byte {error.start})"
        raise Unusable("not_utf8", message) from None


def expanded(pattern: str) -> list[str]:
    """What the braces in `pattern` stand for: `{0000..0331}` counts, `{a,b}` lists.

    UsageError for braces that mean neither, and for more than `MAX_SHARDS` names.
    """
    found = list(islice(_expanded(pattern), MAX_SHARDS + 1))
    if len(found) > MAX_SHARDS:
        raise UsageError(f"{pattern}: means more than {MAX_SHARDS:,} shards")
    return found


def _expanded(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        if "{" in pattern or "}" in pattern:
            raise UsageError(f"{pattern}: has an unmatched brace")
        yield pattern
        return
    before, inside, after = pattern[: match.start()], match[1], pattern[match.end() :]
    numbers = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", inside)
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        if first > last:
            raise UsageError(f"{pattern}: counts backwards, from {first} to {last}")
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        words: Iterator[str] = (f"{number:0{width}}" for number in range(first, last + 1))
    elif "," in inside:
        words = iter(inside.split(","))
    else:
        raise UsageError(f"{pattern}: braces count, as {{0000..0331}}, or list, as {{a,b}}")
    for word in words:
        yield from _expanded(f"{before}{word}{after}")


def local_files(pattern: str) -> list[str]:
    """The paths that a local pattern of braces and `*` means, sorted within each `*`.

    UsageError where one of them is not there, with the names that are.
    """
    found: list[str] = []
    for name in expanded(os.path.expanduser(pattern)):
        matches = sorted(glob.glob(name)) if glob.has_magic(name) else [name]
        if not matches or not os.path.lexists(matches[0]):
            raise UsageError(f"{name}: {_what_is_there(name)}")
        found += matches
    return found


def _what_is_there(name: str) -> str:
    folder = os.path.dirname(name) or "."
    if glob.has_magic(folder):
        return "matches no file"
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    names = sorted(entry for entry in os.listdir(folder) if entry.endswith(".tar"))
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    what = "matches no file" if glob.has_magic(name) else "there is no such shard"
    return f"{what}; the shards in {folder} are {shown or 'none'}{nearest(Path(name).name, names)}"
