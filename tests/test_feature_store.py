"""Features on disk: what comes back, what is damaged, how much there is, who shares it."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aimv2_mllm.data.features.shards import picture_key
from aimv2_mllm.data.features.store import GIB, FeatureStore, Took
from aimv2_mllm.errors import RunFailed, UsageError

ROW = 5 * 8 * 4  # bytes of a row of `rows` in float32


def rows(first: int, count: int, dtype: torch.dtype = torch.float32) -> dict[bytes, Tensor]:
    """Features (5, 8) of as many pictures, by key."""
    found = {}
    for number in range(first, first + count):
        values = torch.randn(5, 8, generator=torch.Generator().manual_seed(number))
        found[picture_key(b"%d" % number, "pad")] = values.to(dtype)
    return found


def opened(folder: Path, tower: str = "tower", gib: float = 1.0) -> FeatureStore:
    store = FeatureStore(folder, tower, gib)
    store.open({"tower": tower})
    return store


def shards(folder: Path, tower: str = "*") -> list[Path]:
    return sorted(folder.glob(f"{tower}/*.safetensors"))


def same(store: FeatureStore, expected: Mapping[bytes, Tensor]) -> bool:
    """Whether the store has just these features of these pictures, to the bit."""
    found = {key: store.get(key) for key in expected}
    return all(
        row is not None and row.dtype == expected[key].dtype and torch.equal(row, expected[key])
        for key, row in found.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_to_the_bit_also_in_another_process(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    store = opened(tmp_path)
    assert store.add(rows(0, 3, dtype))
    assert store.add(rows(3, 2, dtype))
    assert same(store, rows(0, 5, dtype))
    assert store.get(picture_key(b"9", "pad")) is None
    assert store.get(picture_key(b"0", "crop")) is None
    assert same(pickle.loads(pickle.dumps(store)), rows(0, 5, dtype))


def test_a_shard_is_a_file_of_safetensors_that_anybody_reads(tmp_path: Path) -> None:
    opened(tmp_path).add(rows(0, 3))
    [path] = shards(tmp_path)
    read = load_file(path)
    assert read.keys() == {key.hex() for key in rows(0, 3)}
    assert all(torch.equal(read[key.hex()], row) for key, row in rows(0, 3).items())


def test_what_features_took_is_the_mean_of_all_that_were_added(tmp_path: Path) -> None:
    store = opened(tmp_path)
    assert store.took(5) == (5, 0, 0)
    store.add(rows(0, 3), took=Took(3, 30.0, 6.0))
    store.add(rows(2, 1), took=Took(1, 10.0, 6.0))  # by a second process
    assert store.took(8) == opened(tmp_path).took(8) == (8, 80.0, 24.0)
    assert opened(tmp_path, "other").took(1) == (1, 0, 0)


def test_what_is_there_is_not_written_twice(tmp_path: Path) -> None:
    store, late = opened(tmp_path), opened(tmp_path)
    store.add(rows(0, 3))
    assert late.add(rows(0, 4))  # it has not looked since
    assert [len(load_file(path)) for path in shards(tmp_path)] in ([3, 1], [1, 3])
    assert late.add(rows(0, 4))
    assert len(shards(tmp_path)) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b[:-1],
        lambda b: b[:20],
        lambda b: b"",
        lambda b: b"{}" * 50,
        lambda b: b"\xff" * 9,
    ],
)
def test_a_shard_that_is_cut_off_is_removed_and_told_when_it_is_opened(
    tmp_path: Path, spoil: Any
) -> None:
    store = opened(tmp_path)
    store.add(rows(0, 2))
    [spoilt] = shards(tmp_path)
    store.add(rows(2, 2))
    spoilt.write_bytes(spoil(spoilt.read_bytes()))
    told: list[str] = []
    again = FeatureStore(tmp_path, "tower", 1.0)
    again.open({}, told.append)
    [line] = told
    assert line.startswith(f"{spoilt}: removed, and what it held is computed again (")
    assert not any(key in again for key in rows(0, 2))
    assert same(again, rows(2, 2))
    assert not spoilt.exists()
    assert again.add(rows(0, 2))
    assert same(again, rows(0, 4))


def test_a_byte_that_changed_is_found_when_it_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = opened(tmp_path)
    store.add(rows(0, 3))
    [path] = shards(tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again, other = opened(tmp_path), opened(tmp_path)
    first, *_, bad = sorted(rows(0, 3))  # the order in the file
    assert again.get(first) is not None
    assert again.get(bad) is None
    assert first not in again
    assert other.get(bad) is None
    [line] = capsys.readouterr().err.splitlines()  # of two who saw it
    assert (
        line == f"{path}: removed, and what it held is computed again (a checksum does not agree)"
    )
    assert not path.exists()


def test_what_another_removed_is_not_there_and_no_error(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(rows(0, 2))
    store.add(rows(2, 2))
    assert same(store, rows(0, 2))
    for path in shards(tmp_path):
        path.unlink()
    assert all(store.get(key) is None for key in rows(0, 4))


def test_as_many_shards_as_there_are_take_no_open_file(tmp_path: Path) -> None:
    store, count = opened(tmp_path), 20
    for number in range(count):
        store.add(rows(number, 1))
    taken = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 5, limits[1]))
    try:
        assert same(store, rows(0, count))
        assert len(os.listdir("/proc/self/fd")) == taken
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_features_that_cannot_be_read_are_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(tmp_path)
    store.add(rows(0, 1))
    [key] = rows(0, 1)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(RunFailed, match=r"safetensors: cannot be read \(Too many open files\)"):
            store.get(key)
    assert key in store
    assert same(store, rows(0, 1))


def test_there_is_never_more_than_the_bound(tmp_path: Path) -> None:
    store = opened(tmp_path, gib=8 * ROW / GIB)
    taken = 0
    while store.add(rows(taken, 1)):
        taken += 1
        assert sum(path.stat().st_size for path in shards(tmp_path)) <= 8 * ROW
    assert taken >= 2
    assert same(store, rows(0, taken))


def test_towers_that_nobody_uses_make_room_the_oldest_first(tmp_path: Path) -> None:
    for age, tower in enumerate(("new", "old", "used")):
        store = opened(tmp_path, tower)
        store.add(rows(0, 4))
        os.utime(tmp_path / tower / "in-use", (2 * 10**9 - age, 2 * 10**9 - age))
        if tower != "used":
            store.close()
    size = shards(tmp_path)[0].stat().st_size
    mine, told = opened(tmp_path, "mine", gib=(3 * size + 1) / GIB), list[str]()
    assert mine.add(rows(0, 4), told.append)
    [line] = told
    assert line.startswith(f"{tmp_path / 'old'}: features of another tower make room")
    assert [path.parent.name for path in shards(tmp_path)] == ["mine", "new", "used"]
    assert mine.add(rows(4, 4), told.append)
    assert not mine.add(rows(8, 4), told.append)  # `used` stays
    assert [path.parent.name for path in shards(tmp_path)] == ["mine", "mine", "used"]


def test_nobody_goes_for_what_does_not_fit_anyway(tmp_path: Path) -> None:
    other = opened(tmp_path, "other")
    other.add(rows(0, 2))
    other.close()
    assert not opened(tmp_path, "mine", gib=ROW / GIB).add(rows(0, 2))
    assert len(shards(tmp_path, "other")) == 1


def writer(folder: Path, first: int) -> None:
    """Add pictures in shards of 2, and die in the middle of the last."""
    store = opened(folder)
    for start in range(first, first + 20, 2):
        store.add(rows(start, 2))
        assert same(store, rows(start, 2))
    os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    store.add(rows(first + 100, 2))


def test_several_processes_and_their_deaths_do_not_hurt_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=writer, args=(tmp_path, first)) for first in (0, 10, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    store = opened(tmp_path)
    assert same(store, rows(0, 40))
    names = [name for path in shards(tmp_path) for name in load_file(path)]
    assert len(names) == len(set(names)) == 40
    store.add(rows(200, 1))
    assert not list(tmp_path.glob("*/*.part"))


def test_a_pass_is_remembered_as_long_as_its_shards_are_there(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.add(rows(0, 2))
    assert store.noted("p") is None
    store.note_pass("p", {"pictures": 2})
    store.add(rows(2, 2))
    assert opened(tmp_path).noted("p") == {"pictures": 2}
    assert opened(tmp_path).noted("q") is None
    assert json.loads((tmp_path / "tower" / "about.json").read_text()) == {"tower": "tower"}
    for path in shards(tmp_path):
        path.unlink()
    assert opened(tmp_path).noted("p") is None


def test_a_full_disk_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, told = opened(tmp_path), list[str]()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert not store.add(rows(0, 2), told.append)
    assert told == [f"{tmp_path / 'tower'}: takes no more features (No space left on device)"]
    assert not list(tmp_path.glob("*/*.part"))


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"data\.features\.folder: .*file/cache cannot hold feat"):
        opened(tmp_path / "file" / "cache")
