"""Folders, lists and data sets: pictures and captions by number, nothing outside, no waiting."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from corpora import jpeg, sheet
from PIL import Image

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.pairs.sources import SOURCES, PairSource, open_sources
from aimv2_mllm.data.rows import json_index
from aimv2_mllm.errors import UsageError
from aimv2_mllm.recipe.data import SOURCE_SECTIONS, CaptionData


def opened(kind: str, **settings: Any) -> PairSource:
    plain = {key: str(value) for key, value in settings.items()}
    return SOURCES[kind](SOURCE_SECTIONS[kind].model_validate({"kind": kind, **plain}))


def written(folder: Path, count: int = 3) -> list[tuple[bytes, str]]:
    """Sheets as pictures with captions beside them, one of them in a folder of its own."""
    (folder / "b").mkdir()
    rows = [sheet(index) for index in range(count)]
    for index, (picture, caption) in enumerate(rows):
        place = folder / ("b" if index == 1 else "") / f"{index}.jpg"
        place.write_bytes(picture)
        place.with_suffix(".txt").write_text(caption)
    return rows


def lines(folder: Path, *rows: dict[str, Any] | str, name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    return path


def reason(source: PairSource, row: int) -> str:
    with pytest.raises(Unusable) as error:
        source.read(row)
    return error.value.reason


def test_every_kind_of_source_but_the_world_can_be_opened() -> None:
    assert [*SOURCES, "handwriting"].sort() == [*SOURCE_SECTIONS].sort()
    assert open_sources(CaptionData()) == [None]


def test_a_folder_gives_pictures_with_the_text_beside_them(tmp_path: Path) -> None:
    rows = written(tmp_path)
    (tmp_path / "notes.md").write_text("no picture")
    source = opened("folder", folder=tmp_path)
    assert source.groups == [3]
    assert [source.read(i) for i in range(3)] == [rows[0], rows[2], rows[1]]
    assert source.name(2) == str(tmp_path / "b" / "1.jpg")


def test_a_caption_is_read_without_its_picture_which_must_be_there(tmp_path: Path) -> None:
    written(tmp_path)
    source = opened("folder", folder=tmp_path)
    caption, picture = source.caption(0)
    assert caption == sheet(0)[1]
    (tmp_path / "0.jpg").write_bytes(b"another")
    assert picture() == b"another"
    (tmp_path / "0.jpg").unlink()
    for read in (lambda: source.caption(0), picture):
        with pytest.raises(Unusable, match=r"0\.jpg: cannot be read"):
            read()


def test_a_folder_with_metadata_gives_what_that_lists(tmp_path: Path) -> None:
    rows = written(tmp_path)
    lines(
        tmp_path,
        {"file_name": "b/1.jpg", "caption": "x", "text": "y"},
        {"file_name": "0.jpg", "caption": "z"},
        name="metadata.jsonl",
    )
    source = opened("folder", folder=tmp_path)
    assert [source.read(i) for i in range(2)] == [(rows[1][0], "x"), (rows[0][0], "z")]
    other = opened("folder", folder=tmp_path, caption="text")
    assert other.read(0) == (rows[1][0], "y")
    assert reason(other, 1) == "no_caption"


def test_a_folder_that_is_missing_or_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no pictures"):
        opened("folder", folder=tmp_path)
    with pytest.raises(UsageError, match=r"nowhere: cannot be read \(No such file"):
        opened("folder", folder=tmp_path / "nowhere")


def test_a_list_names_pictures_below_its_root(tmp_path: Path) -> None:
    rows = written(tmp_path)
    (tmp_path / "lists").mkdir()
    file = lines(
        tmp_path / "lists", {"image": "b/1.jpg", "caption": "é"}, "", {"image": "0.jpg", "c": "d"}
    )
    source = opened("jsonl", file=file, root=tmp_path)
    assert source.groups == [2]
    assert source.read(0) == (rows[1][0], "é")
    assert source.name(1) == f"{file}, row 1"
    assert reason(source, 1) == "no_caption"
    assert opened("jsonl", file=file, root=tmp_path, caption="c").read(1) == (rows[0][0], "d")


def test_what_leads_out_of_the_root_is_not_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.jpg").write_bytes(sheet(0)[0])
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "ring.jpg").symlink_to(root / "ring.jpg")
    os.mkfifo(root / "pipe.jpg")
    (root / "folder.jpg").mkdir()
    said = [
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "link.jpg",
        "a/../../secret.jpg",
        "pipe.jpg",
        "folder.jpg",
        "absent.jpg",
        "ring.jpg",
        "a\0b.jpg",
        "/dev/zero",
    ]
    source = opened("jsonl", file=lines(root, *({"image": s, "caption": "c"} for s in said)))
    assert [reason(source, row) for row in range(len(said))] == [
        *["outside_root"] * 4,
        *["unreadable"] * 5,
        "outside_root",
    ]
    pictures = opened("folder", folder=root)
    names = [pictures.name(row) for row in range(sum(pictures.groups))]
    (root / "link.txt").write_text("a caption")
    assert reason(pictures, names.index(str(root / "link.jpg"))) == "outside_root"


def test_a_picture_file_above_the_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aimv2_mllm.data.pairs import sources

    written(tmp_path)
    monkeypatch.setattr(sources, "MAX_PICTURE_BYTES", 100)
    assert reason(opened("folder", folder=tmp_path), 0) == "too_large"


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"image": "0.jpg", "caption": ', "is not JSON"),
        ("[1, 2]", 'has no field "image"'),
        ('{"imag": "0.jpg", "caption": "x"}', "it has imag, caption"),
        ('{"image": 3, "caption": "x"}', 'has no field "image"'),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_broken_line_is_a_row_that_cannot_be_used(tmp_path: Path, line: str, rule: str) -> None:
    rows = written(tmp_path)
    row = {"image": "0.jpg", "caption": "c"}
    source = opened("jsonl", file=lines(tmp_path, row, "", line, row))
    assert [source.read(place) for place in (0, 2)] == [(rows[0][0], "c")] * 2
    with pytest.raises(Unusable, match=rule):
        source.read(1)


def test_a_list_of_which_no_row_names_a_picture_is_refused(tmp_path: Path) -> None:
    file = lines(tmp_path, *[{"imag": "0.jpg", "caption": "x"}, {"image": 3}] * 100)
    with pytest.raises(UsageError, match=r"pairs\.jsonl, row 0: .* it has imag, caption"):
        opened("jsonl", file=file)


def test_a_list_is_opened_by_its_index_the_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = lines(tmp_path, {"image": "0.jpg", "caption": "c"})
    first = opened("jsonl", file=file)
    assert (tmp_path / "pairs.jsonl.index.safetensors").is_file()
    monkeypatch.setattr(json_index, "_built", None)
    assert opened("jsonl", file=file).digest == first.digest


def test_a_list_that_is_missing_empty_or_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, rule in (
        (lines(tmp_path), "has no rows"),
        (tmp_path / "absent", "No such file"),
        (tmp_path / "pipe", "is not a regular file"),
    ):
        with pytest.raises(UsageError, match=rule):
            opened("jsonl", file=path)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set saved to disk: two sheets, and a row with a picture and no caption."""
    datasets = pytest.importorskip("datasets")
    rows = [sheet(0), sheet(1), (jpeg(Image.new("RGB", (8, 8))), None)]
    columns = {
        "image": [{"bytes": picture, "path": None} for picture, _ in rows],
        "caption": [caption for _, caption in rows],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    path = tmp_path_factory.mktemp("table")
    whole = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(str(path))
    return path


def test_a_data_set_on_disk_gives_its_rows(table: Path) -> None:
    source = opened("datasets", dataset=table)
    assert source.groups == [3]
    assert [source.read(i) for i in (1, 0)] == [sheet(1), sheet(0)]
    assert reason(source, 2) == "no_caption"
    assert source.digest == opened("datasets", dataset=table).digest


def test_a_wrong_column_split_or_name_is_told(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'no column "capton" .*; did you mean caption\?'):
        opened("datasets", dataset=table, caption="capton")
    with pytest.raises(UsageError, match=r"no split tran; it has train, test; did you mean train"):
        opened("datasets", dataset=table, split="tran")
    with pytest.raises(UsageError, match="cannot be loaded"):
        opened("datasets", dataset=tmp_path)
