"""Tar shards: every whole row, read by its place; nothing unpacked, nothing waited for."""

import errno
import json
import os
import shutil
import tarfile
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from corpora import sheet, write_shard, write_tar

from aimv2_mllm.data.files import Unusable, expanded
from aimv2_mllm.data.rows import local_copies, tar_index, tars
from aimv2_mllm.data.rows.columns import INDEX_ENDING
from aimv2_mllm.data.rows.local_copies import COPY, GIB
from aimv2_mllm.data.rows.tars import Shards
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.recipe.data import ShardsSource


def opened(*urls: str | Path, **settings: Any) -> Shards:
    return Shards(ShardsSource(urls=[str(url) for url in urls], **settings))


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.fixture(autouse=True)
def _cache_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


def test_rows_are_what_was_written_in_any_order(tmp_path: Path) -> None:
    write_shard(tmp_path / "a-000.tar", range(3))
    write_shard(tmp_path / "a-001.tar", range(3, 7))
    rows = opened(tmp_path / "a-{000..001}.tar")
    assert rows.groups == [3, 4]
    assert [rows.read(i) for i in (6, 0, 3, 2)] == [sheet(i) for i in (6, 0, 3, 2)]
    assert rows.name(3) == f"{tmp_path}/a-001.tar, row 0"
    assert rows.notes == []


def test_rows_are_those_that_an_independent_reader_finds(tmp_path: Path) -> None:
    from datasets import load_dataset

    path = write_shard(tmp_path / "a.tar", range(4))
    theirs = load_dataset(
        "webdataset", data_files=str(path), split="train", cache_dir=str(tmp_path / "theirs")
    )
    rows = opened(path)
    assert [rows.read(i)[1] for i in range(4)] == theirs["txt"]


def test_a_long_name_and_a_name_with_dots_are_read(tmp_path: Path) -> None:
    deep = "x" * 90 + "/" + "y" * 140
    members = {f"{deep}.jpg": b"A", f"{deep}.txt": b"a", "v1.0/k.png": b"B", "v1.0/k.seg.png": b"-"}
    members |= {"v1.0/k.json": b'{"caption": "b", "text": "c"}', "v1.0/k.pyd": b"never looked at"}
    path = write_tar(tmp_path / "a.tar", members)
    rows = opened(path)
    assert [rows.read(i) for i in range(2)] == [(b"A", "a"), (b"B", "b")]
    assert opened(path, caption="text").read(1) == (b"B", "c")


def test_rows_without_caption_or_picture_bytes_say_so(tmp_path: Path) -> None:
    members = {"a.jpg": b"A", "b.jpg": b"", "b.txt": b"b", "c.jpg": b"C", "c.txt": b"\xff\xfe"}
    members |= {"d.jpg": b"D", "d.json": b'{"caption": 3}', "e.jpg": b"E", "e.json": b"[1]"}
    rows = opened(write_tar(tmp_path / "a.tar", members))
    reasons = []
    for row in range(5):
        with pytest.raises(Unusable) as error:
            rows.read(row)
        assert rows.name(row) in str(error.value)
        reasons.append(error.value.reason)
    assert reasons == ["no_caption", "empty", "not_utf8", "no_caption", "no_caption"]


def test_names_that_lead_out_links_and_devices_are_left_out_and_said(tmp_path: Path) -> None:
    members: dict[str, Any] = {
        "../evil.jpg": b"E",
        "../evil.txt": b"e",
        "/etc/evil.jpg": b"E",
        "link.jpg": special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        "hard.jpg": special("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
        "pipe.jpg": special("pipe.jpg", tarfile.FIFOTYPE),
        "null.jpg": special("null.jpg", tarfile.CHRTYPE),
        "good.jpg": b"G",
        "good.txt": b"g",
        "link.txt": b"l",
    }
    rows = opened(write_tar(tmp_path / "a.tar", members))
    assert rows.groups == [1]
    assert rows.read(0) == (b"G", "g")
    [note] = rows.notes
    assert "3 unsafe name" in note
    assert "4 no regular file" in note
    assert "1 without a picture" in note
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", f"a.tar{INDEX_ENDING}"]


@pytest.mark.parametrize("place", ["in a picture", "in a caption", "in a header", "at a member"])
def test_of_a_cut_shard_the_whole_rows_are_used(tmp_path: Path, place: str) -> None:
    path = write_shard(tmp_path / "a.tar", range(5))
    with tarfile.open(path) as tar:
        picture, caption = (tar.getmember(f"000003.{ending}") for ending in ("jpg", "txt"))
    end = {
        "in a picture": picture.offset_data + 10,
        "in a caption": caption.offset_data + 1,
        "in a header": picture.offset + 100,
        "at a member": caption.offset,
    }[place]
    os.truncate(path, end)
    rows = opened(path)
    assert rows.groups == [3]
    assert [rows.read(i) for i in range(3)] == [sheet(i) for i in range(3)]
    [note] = rows.notes
    assert "3 rows are used; left out: " in note
    assert "cut off" in note


def test_a_shard_damaged_in_the_middle_is_used_up_to_there(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", range(5))
    with tarfile.open(path) as tar:
        offset = tar.getmember("000002.jpg").offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"garbage" * 50)
    rows = opened(path)
    assert rows.groups == [2]
    assert "cut off" in rows.notes[0]


@pytest.mark.parametrize("content", [b"", b"text, not tar " * 100, b"\x1f\x8b\x08" + bytes(600)])
def test_what_is_no_tar_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.tar: is not a whole, uncompressed tar file"):
        opened(path)


def test_a_pipe_folder_or_device_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for path in (tmp_path / "pipe.tar", tmp_path / "folder.tar", Path("/dev/zero")):
        with pytest.raises(UsageError, match="is not a regular file"):
            opened(path)


def test_a_list_that_matches_nothing_says_what_is_there(tmp_path: Path) -> None:
    write_shard(tmp_path / "pairs-001.tar", range(1))
    with pytest.raises(UsageError, match=r"no file; the shards in .* are pairs-001\.tar"):
        opened(tmp_path / "pair-*.tar")
    with pytest.raises(UsageError, match=r"no such shard.*; did you mean pairs-001\.tar\?"):
        opened(tmp_path / "pairs-{001..002}.tar")
    with pytest.raises(UsageError, match="there is no folder"):
        opened(tmp_path / "nowhere" / "*.tar")


def test_braces_count_and_list() -> None:
    assert expanded("a{08..11}") == ["a08", "a09", "a10", "a11"]
    assert expanded("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    for pattern, rule in (
        ("a{3..1}", "backwards"),
        ("a{b}", "braces count"),
        ("a{1..2", "unmatched"),
        ("a{0..9999999}", "more than"),
    ):
        with pytest.raises(UsageError, match=rule):
            expanded(pattern)


def indexed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are indexed from now on."""
    built: list[str] = []
    build = tars.build_index

    def counting(path: Path, name: str) -> Any:
        built.append(name)
        return build(path, name)

    monkeypatch.setattr(tars, "build_index", counting)
    return built


def test_an_index_is_built_once_and_again_when_the_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "a.tar", range(2))
    built = indexed(monkeypatch)
    first = opened(path).digest
    assert opened(path).digest == first
    assert built == [str(path)]
    write_shard(path, range(1, 4))
    changed = opened(path)
    assert changed.groups == [3]
    assert changed.digest != first
    assert changed.read(0) == sheet(1)
    assert len(built) == 2


@pytest.mark.parametrize("kind", ["of another shard", "cut", "of nothing", "with other numbers"])
def test_an_index_that_is_not_this_shards_is_built_anew(tmp_path: Path, kind: str) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path, other = (write_shard(tmp_path / f"{name}.tar", (ord(name),)) for name in "ab")
    right = opened(path).read(0)
    index = tmp_path / f"a.tar{INDEX_ENDING}"
    if kind == "of another shard":
        # Padded to one size and time, so that only the headers inside can tell.
        size = max(path.stat().st_size, other.stat().st_size) + 1024
        for file in (path, other):
            os.truncate(file, size)
            os.utime(file, (1, 1))
        opened(other)
        shutil.copy(tmp_path / f"b.tar{INDEX_ENDING}", index)
    elif kind == "cut":
        index.write_bytes(index.read_bytes()[:100])
    elif kind == "of nothing":
        index.write_bytes(b"")
    else:
        with safe_open(index, "np") as file:
            facts = file.metadata()
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        columns["text_offset"] = columns["text_offset"] + 1
        save_file(columns, index, facts)
    assert opened(path).read(0) == right


def test_a_shard_that_changes_under_the_run_ends_it(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", range(3))
    rows = opened(path)
    rows.read(0)
    write_shard(path, range(5, 8))
    with pytest.raises(RunFailed, match=r"a\.tar: is not the shard that was opened"):
        rows.read(1)
    path.unlink()
    with pytest.raises(RunFailed, match=r"a\.tar: is not the shard that was opened"):
        rows.read(1)


def refusing(*_: Any) -> Any:
    raise OSError(errno.EIO, "Input/output error")


def test_a_shard_that_cannot_be_read_any_more_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = opened(write_shard(tmp_path / "a.tar", range(3)))
    rows.read(0)
    monkeypatch.setattr(tars, "regular_file", refusing)
    with pytest.raises(RunFailed, match=r"a\.tar: cannot be read any more \(Input/output error\)"):
        rows.read(1)


def test_a_shard_with_an_index_that_cannot_be_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "a.tar", range(3))
    opened(path)
    monkeypatch.setattr(tar_index, "regular_file", refusing)
    with pytest.raises(UsageError, match=r"a\.tar: cannot be read \(Input/output error\)"):
        opened(path)


def test_the_index_goes_to_the_cache_where_the_folder_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "a.tar", range(2))
    (tmp_path / f"a.tar{INDEX_ENDING}").mkdir()  # in its way, for root too
    built = indexed(monkeypatch)
    for _ in range(2):
        assert opened(path, cache=str(tmp_path / "cache")).groups == [2]
    assert len(built) == 1
    assert [p.name.endswith(INDEX_ENDING) for p in (tmp_path / "cache").iterdir()] == [True]


def uploaded(tmp_path: Path, count: int, rows: int = 3) -> list[str]:
    """Shards of `rows` sheets each, in fsspec's file system in memory."""
    system, urls, base = fsspec.filesystem("memory"), [], uuid.uuid4().hex
    for number in range(count):
        path = write_shard(tmp_path / "up.tar", range(number * rows, (number + 1) * rows))
        urls.append(f"memory://{base}/a-{number:03}.tar")
        system.pipe(urls[-1], path.read_bytes())
        path.unlink()
    return urls


def copies(cache: Path) -> list[str]:
    return sorted(p.name.split("-", 1)[1].removesuffix(COPY) for p in cache.glob(f"*{COPY}"))


def test_remote_shards_are_read_through_copies(tmp_path: Path) -> None:
    urls = uploaded(tmp_path, 3)
    cache = tmp_path / "cache"
    rows = opened(urls[0].replace("000", "*"), cache=str(cache))
    assert rows.groups == [3, 3, 3]
    assert [rows.read(i) for i in range(9)] == [sheet(i) for i in range(9)]
    assert copies(cache) == ["a-000.tar", "a-001.tar", "a-002.tar"]
    again = opened(urls[0].replace("000", "{000..002}"), cache=str(cache))
    assert again.digest == rows.digest


def test_the_copies_stay_within_the_bound_and_the_unused_go_first(tmp_path: Path) -> None:
    urls = uploaded(tmp_path, 3)
    size = fsspec.filesystem("memory").info(urls[0])["size"]
    cache = tmp_path / "cache"
    rows = opened(*urls, cache=str(cache), cache_gib=2.5 * size / GIB)
    assert copies(cache) == ["a-001.tar", "a-002.tar"]
    for row, kept in ((0, ["000", "002"]), (8, ["000", "002"]), (3, ["001", "002"])):
        assert rows.read(row) == sheet(row)
        assert copies(cache) == [f"a-{number}.tar" for number in kept]


def test_a_shard_above_the_bound_is_refused(tmp_path: Path) -> None:
    [url] = uploaded(tmp_path, 1)
    with pytest.raises(UsageError, match="raise cache_gib"):
        opened(url, cache=str(tmp_path / "cache"), cache_gib=1e-6)


def test_a_copy_that_was_cut_short_is_fetched_again(tmp_path: Path) -> None:
    [url] = uploaded(tmp_path, 1)
    cache = tmp_path / "cache"
    rows = opened(url, cache=str(cache))
    [copy] = cache.glob(f"*{COPY}")
    os.truncate(copy, 100)
    assert rows.read(1) == sheet(1)


def test_a_failing_download_leaves_no_half_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [url] = uploaded(tmp_path, 1)
    cache = tmp_path / "cache"

    class Refused(Exception):
        """As botocore's, which are no OSError."""

    def broken(*_: Any, **__: Any) -> Any:
        raise Refused("no credentials")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "open", broken)
    with pytest.raises(RunFailed, match=r"a-000\.tar: cannot be read \(Refused: no credentials\)"):
        opened(url, cache=str(cache))
    assert not [p for p in cache.iterdir() if not p.name.endswith(".lock")]


def test_a_full_local_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [url] = uploaded(tmp_path, 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_copies.os, "fsync", full)
    with pytest.raises(RunFailed, match=r"could not be written to .* \(No space left on device\)"):
        opened(url, cache=str(tmp_path / "cache"))


def test_unknown_and_missing_urls_are_told() -> None:
    with pytest.raises(UsageError, match="Protocol not known: s4"):
        opened("s4://bucket/a.tar")
    with pytest.raises(UsageError, match="there is no such shard"):
        opened("memory://nowhere/a-*.tar")


def test_an_index_holds_no_more_than_where_rows_lie(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = write_shard(tmp_path / "a.tar", range(2))
    opened(path)
    with safe_open(f"{path}{INDEX_ENDING}", "np") as file:
        assert json.loads(file.metadata()["left_out"]) == {}
        assert file.metadata()["shard_size"] == str(path.stat().st_size)
