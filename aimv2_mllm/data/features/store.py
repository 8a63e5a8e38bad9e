"""Features of pictures on disk, computed once: shards that are whole or not there, within a bound.

A row has the features of one picture, under a key that its content decides. The headers of the
shards are the index. Several processes may share the folder, also for different towers, of which
each has a folder in it: writers wait for each other, and readers need no lock.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from aimv2_mllm.data.features.shards import Damaged, Shard, read_shard, remove, serialised
from aimv2_mllm.disk import replace_file
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.formats import GIB
from aimv2_mllm.narration import Narrate, note

SHARD_BYTES = 64 * 2**20  # of a shard at most; what is lost by a kill
SHARD, PART, PASS = ".safetensors", ".part", ".pass.json"  # endings
TOOK = "took.json"  # what computing took, of all rows of a tower that were ever added
IN_USE = "in-use"  # a file that is locked by those who use the folder, and as old as its last use


class Took(NamedTuple):
    """What computing the features of so many pictures took."""

    pictures: int = 0
    flops: float = 0.0
    seconds: float = 0.0


NOTHING = Took()


class FeatureStore:
    """The rows of one tower, in `folder`/`tower`; all towers' shards take up at most `gib` GiB.

    It can be sent to another process, which reads the headers again.
    """

    def __init__(self, folder: str | Path, tower: str, gib: float) -> None:
        self.folder = Path(folder).expanduser()
        self.own, self.most_gib = self.folder / tower, gib
        self._shards: dict[str, Shard] = {}  # by the name of the file
        self._where: dict[bytes, str] = {}
        self._held: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.folder, self.own.name, self.most_gib)

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    @property
    def gib(self) -> float:
        """What this tower's shards take up."""
        return sum(shard.size for shard in self._shards.values()) / GIB

    def open(self, about: Mapping[str, Any], tell: Narrate = note) -> None:
        """Make the folder, keep it from being dropped, and read the headers of its shards.

        `about` tells people what it holds. UsageError for a folder that cannot be used.
        """
        try:
            with self._locked():
                self.own.mkdir(exist_ok=True)
                self._held = (self.own / IN_USE).open("a")
                fcntl.flock(self._held, fcntl.LOCK_SH)
                os.utime(self.own / IN_USE)
                self._write(self.own / "about.json", json.dumps(about, indent=2).encode())
        except OSError as error:
            raise UsageError(
                f"data.features.folder: {self.folder} cannot hold features ({error.strerror});"
                " give another folder"
            ) from None
        self.refresh(tell)

    def close(self) -> None:
        """Let others drop this tower's features where they need room."""
        if self._held is not None:
            self._held.close()

    def refresh(self, tell: Narrate = note) -> None:
        """Look again which shards there are; one that is damaged is removed, and told of."""
        there = {path.name: path for path in sorted(self.own.glob(f"*{SHARD}"))}
        for name in self._shards.keys() - there.keys():
            self._forget(name)
        for name in sorted(there.keys() - self._shards.keys()):
            try:
                self._shards[name] = read_shard(there[name])
            except FileNotFoundError:
                continue
            except (Damaged, UsageError) as error:
                remove(there[name], error, tell)
                continue
            self._where.update(dict.fromkeys(self._shards[name].rows, name))

    def get(self, key: bytes) -> Tensor | None:
        """The features (N, D) of a picture, or None where they are not there or damaged.

        RunFailed where the system does not let them be read.
        """
        name = self._where.get(key)
        if name is None:
            return None
        shard = self._shards[name]
        try:
            return shard.row(key)
        except FileNotFoundError:  # dropped since by who needed room
            self._forget(name)
        except Damaged as error:
            self._forget(name)
            remove(shard.path, error, note)
        except OSError as error:
            raise RunFailed(
                f"{shard.path}: cannot be read ({error.strerror}); mend that and run the same"
                " command again"
            ) from None
        return None

    def add(
        self,
        rows: Mapping[bytes, Tensor],
        tell: Narrate = note,
        *,
        took: Took = NOTHING,
    ) -> bool:
        """Write `rows`, computing which `took` that much, as a shard, but for those that are there;
        False where they do not fit.

        Other towers' folders that nobody uses make room, the one used longest ago first.
        """
        try:
            with self._locked():
                self.refresh(tell)
                new = {key: row for key, row in rows.items() if key not in self}
                content = serialised(new) if new else b""
                if new and not self._has_room(len(content), tell):
                    return False
                pictures, flops, seconds = self._took()
                total = (pictures + took.pictures, flops + took.flops, seconds + took.seconds)
                self._write(self.own / TOOK, json.dumps(total).encode())
                if new:
                    name = hashlib.sha256(b"".join(sorted(new))).hexdigest()[:24]
                    self._write(self.own / f"{name}{SHARD}", content)
        except OSError as error:
            tell(f"{self.own}: takes no more features ({error.strerror})")
            return False
        self.refresh(tell)
        return True

    def took(self, pictures: int) -> Took:
        """What computing so many pictures takes, by the mean of all that were ever added."""
        total = self._took()
        share = pictures / max(1, total.pictures)
        return Took(pictures, total.flops * share, total.seconds * share)

    def _took(self) -> Took:
        path = self.own / TOOK
        return Took(*json.loads(path.read_bytes())) if path.exists() else NOTHING

    def note_pass(self, name: str, facts: Mapping[str, Any]) -> None:
        """Remember that the pictures which `name` stands for have been gone through."""
        content = json.dumps({"facts": dict(facts), "shards": sorted(self._shards)}).encode()
        with suppress(OSError), self._locked():  # without a note they are gone through again
            self._write(self.own / f"{name}{PASS}", content)

    def noted(self, name: str) -> dict[str, Any] | None:
        """The facts of that pass, if all shards that there were then are still there."""
        try:
            noted = json.loads((self.own / f"{name}{PASS}").read_bytes())
            whole = all(shard in self._shards for shard in noted["shards"])
            return dict(noted["facts"]) if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # no pass, or as good as none

    def _forget(self, name: str) -> None:
        for key in self._shards.pop(name).rows:
            if self._where.get(key) == name:
                del self._where[key]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, path: Path, content: bytes) -> None:
        self.own.mkdir(exist_ok=True)
        replace_file(path, content)

    def _has_room(self, size: int, tell: Narrate) -> bool:
        for part in self.folder.glob(f"*/*{PART}"):  # of who was killed while it had the lock
            part.unlink(missing_ok=True)
        taken: dict[Path, int] = {}
        for path in self.folder.glob(f"*/*{SHARD}"):
            with suppress(FileNotFoundError):  # a reader removes what is damaged
                taken[path.parent] = taken.get(path.parent, 0) + path.stat().st_size
        most, size = int(self.most_gib * GIB), size + taken.pop(self.own, 0)
        if size > most:
            return False  # the others need not go for what will not fit
        total = size + sum(taken.values())
        for folder in sorted(taken, key=_last_use):
            if total > most and _dropped(folder):
                total -= taken[folder]
                gib = taken[folder] / GIB
                tell(f"{folder}: features of another tower make room ({gib:.3f} GiB)")
        return total <= most


def _opened(folder: Path, tower: str, gib: float) -> FeatureStore:
    store = FeatureStore(folder, tower, gib)
    store.refresh()
    return store


def _last_use(folder: Path) -> float:
    mark = folder / IN_USE
    return mark.stat().st_mtime if mark.exists() else 0.0


def _dropped(folder: Path) -> bool:
    """Remove the features of a tower, unless somebody uses them."""
    try:
        with (folder / IN_USE).open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
    except OSError:  # in use, or not ours to remove
        return False
    return True
