"""Copies of remote shards on the local disk: each whole or not there, all within a bound.

Several processes may share the folder. Which copy goes when room is needed: the one that was used
longest ago.
"""

import fcntl
import glob
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aimv2_mllm.data.files import expanded
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.formats import GIB

PIECE = 8 * 2**20  # bytes moved at a time
COPY, PART = ".shard", ".part"  # endings of a whole copy, and of one that is being fetched


def user_cache() -> Path:
    """Where copies go when a recipe does not say: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "aimv2_mllm" / "shards"


@contextmanager
def _remote(url: str) -> Iterator[tuple[Any, str]]:
    """fsspec's file system for `url` and the path in it; what it raises becomes RunFailed."""
    try:
        import fsspec
    except ImportError:
        raise UsageError("shards behind URLs need fsspec: pip install 'aimv2-mllm[data]'") from None
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        # "Install s3fs to access S3", "Protocol not known: s4"
        raise UsageError(f"{url}: {error}") from None
    try:
        yield system, str(path)
    except (UsageError, RunFailed):
        raise
    except OSError as error:
        raise RunFailed(f"{url}: cannot be read ({error})") from None
    except Exception as error:  # each file system has its own kinds: botocore, aiohttp, gcsfs ...
        raise RunFailed(f"{url}: cannot be read ({type(error).__name__}: {error})") from None


def remote_files(pattern: str) -> list[tuple[str, int, str]]:
    """The shards that a URL with braces and `*` means: (URL, bytes, a stamp of this version of it).

    UsageError where one is not there.
    """
    found = []
    for url in expanded(pattern):
        with _remote(url) as (system, path):
            if glob.has_magic(path):
                matches = sorted(system.glob(path))
            else:
                matches = [path] if system.exists(path) else []
            if not matches:
                raise UsageError(f"{url}: there is no such shard")
            for match in matches:
                facts = system.info(match)
                if facts.get("type") != "file" or facts.get("size") is None:
                    raise UsageError(f"{url}: {match} is not a file of known size")
                name = str(system.unstrip_protocol(match))
                found.append((name, int(facts["size"]), str(system.ukey(match))))
    return found


def _pieces(url: str) -> Iterator[bytes]:
    """What lies behind `url`, piece by piece; RunFailed where it cannot be read."""
    with _remote(url) as (system, path), system.open(path, "rb") as source:
        while piece := source.read(PIECE):
            yield piece


class ShardCache:
    """A folder of copies that together take up at most `gib` GiB."""

    def __init__(self, folder: Path, gib: float) -> None:
        self.folder, self._most = folder, int(gib * GIB)

    def path(self, url: str, ending: str) -> Path:
        """Where something that belongs to `url` lies in the folder, there or not."""
        digest = hashlib.sha256(url.encode()).hexdigest()[:16]
        return self.folder / f"{digest}-{url.rstrip('/').rsplit('/', 1)[-1][-100:]}{ending}"

    def fetch(self, url: str, size: int) -> Path:
        """The local copy of the shard at `url`, which has `size` bytes; fetched if need be.

        UsageError for a shard above the bound, RunFailed when it cannot be fetched or stored.
        """
        target = self.path(url, COPY)
        if self._is_whole(target, size):
            return target
        if size > self._most:
            raise UsageError(
                f"{url}: has {size / GIB:.2f} GiB, and cache_gib allows {self._most / GIB:.2f} in"
                f" {self.folder}: raise cache_gib"
            )
        with self._locked(target.name):
            if not self._is_whole(target, size):  # another process may have fetched it
                self._download(url, size, target)
        return target

    def _is_whole(self, target: Path, size: int) -> bool:
        try:
            if target.stat().st_size != size:
                return False
            _mark_used(target)
        except FileNotFoundError:
            return False
        return True

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / f"{name}.lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UsageError(
                f"{self.folder}: cannot hold copies of shards ({error.strerror}); give another"
                " folder as cache"
            ) from None
        with lock:
            yield

    def _download(self, url: str, size: int, target: Path) -> None:
        unfinished = target.with_name(f"{target.name}{PART}")  # the lock makes it ours
        try:
            with self._locked("room"):
                self._make_room(size)
                unfinished.write_bytes(b"")
                os.truncate(unfinished, size)  # what it will take up counts from now on
            with unfinished.open("r+b") as copy:
                for piece in _pieces(url):
                    copy.write(piece)
                found = copy.tell()
                os.fsync(copy.fileno())
            if found != size:
                raise RunFailed(f"{url}: {found:,} of {size:,} bytes came: run it again")
            _mark_used(unfinished)
            unfinished.replace(target)
        except OSError as error:
            raise RunFailed(
                f"{url}: its copy could not be written to {self.folder} ({error.strerror}); the"
                " other copies are whole: mend that and run the same command again"
            ) from None
        finally:
            unfinished.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        copies, total = [], size
        for path in (*self.folder.glob(f"*{COPY}"), *self.folder.glob(f"*{PART}")):
            with suppress(FileNotFoundError):
                status = path.stat()
                total += status.st_size
                if path.name.endswith(COPY):
                    copies.append((status.st_mtime_ns, status.st_size, path))
        for _, its_size, path in sorted(copies):
            if total <= self._most:
                return
            # Whoever reads it now keeps its open file; whoever comes next fetches it again.
            path.unlink(missing_ok=True)
            total -= its_size


def _mark_used(copy: Path) -> None:
    # The last to go. The file system's own clock ticks only every few milliseconds.
    now = time.time_ns()
    os.utime(copy, ns=(now, now))
