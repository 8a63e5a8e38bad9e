"""Labelled pictures: which class, which split, and what is refused before any work."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aimv2_mllm.data.questions.labelled import load_labelled
from aimv2_mllm.errors import UsageError


def class_folders(folder: Path, classes: dict[str, int]) -> Path:
    """A folder for each class with that many pictures, the nth of grey level n."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture = Image.new("L", (6, 4), number)
            picture.save(folder / name / f"{number:02}.png")
    return folder


def levels(part) -> list[tuple[int, int]]:
    """The class and grey level of every picture of a split."""
    return [(label, part.open(i, 8).getpixel((0, 0))[0]) for i, label in enumerate(part.labels)]


def test_a_folder_with_its_own_test_split_keeps_it(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"cat": 3, "dog": 2})
    class_folders(tmp_path / "val", {"dog": 2})
    (tmp_path / "train" / "cat" / ".hidden").write_text("")
    data = load_labelled(str(tmp_path), seed=0)
    assert data.classes == ["cat", "dog"]
    assert data.split == "its train and val"
    assert levels(data.train) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert levels(data.test) == [(1, 0), (1, 1)]


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_folder_without_one_is_split_by_the_seed(tmp_path: Path, inside: str) -> None:
    class_folders(tmp_path / inside, {"cat": 10, "dog": 15})
    first, again, other = (load_labelled(str(tmp_path), seed=seed) for seed in (0, 0, 1))
    assert "20% of each class, drawn with seed 0" in first.split
    assert levels(first.test) == levels(again.test) != levels(other.test)
    assert sorted(first.test.labels) == [0] * 2 + [1] * 3
    assert not set(levels(first.test)) & set(levels(first.train))
    assert len(first.test.labels) + len(first.train.labels) == 25


def test_a_limit_is_drawn_by_the_seed(tmp_path: Path) -> None:
    data = load_labelled("handwriting", seed=2, limit=50)
    assert len(data.train.labels) == len(data.test.labels) == 50
    assert len(set(data.train.labels)) == 10
    assert data.split.endswith("of each at most 50")
    again = load_labelled("handwriting", seed=2, limit=50)
    assert np.array_equal(again.train.open(7, 20), data.train.open(7, 20))


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        ({}, "has no classes"),
        ({"cat": 3}, "has one class only, cat"),
        ({"cat": 3, "dog": 0}, "the class dog has no pictures"),
        ({"cat": 3, "dog": 1}, "the class dog has one picture; two are the least"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(tmp_path: Path, classes, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        load_labelled(str(class_folders(tmp_path, classes)), seed=0)


def test_a_class_of_the_test_alone_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"cat": 1, "dog": 1})
    class_folders(tmp_path / "test", {"cat": 1, "cow": 1})
    with pytest.raises(UsageError, match=r"test: has a class cow, which .*train has not"):
        load_labelled(str(tmp_path), seed=0)


def test_what_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such folder; did you mean handwriting"):
        load_labelled("handwritng", seed=0)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UsageError, match="is a file; give handwriting, a folder"):
        load_labelled(str(file), seed=0)


def saved(folder: Path, splits: dict[str, list[tuple[bytes, int]]]) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    )
    tables = {
        name: datasets.Dataset.from_dict(
            {
                "picture": [{"bytes": content, "path": None} for content, _ in rows],
                "kind": [kind for _, kind in rows],
            },
            features,
        )
        for name, rows in splits.items()
    }
    datasets.DatasetDict(tables).save_to_disk(folder)
    return str(folder)


def png(level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (6, 4), level).save(stream, "PNG")
    return stream.getvalue()


def test_a_saved_dataset_is_read_by_its_columns(tmp_path: Path) -> None:
    rows = [(png(10 + i), i % 2) for i in range(4)]
    source = saved(tmp_path / "d", {"train": rows, "test": [*rows[:1], (b"no picture", 1)]})
    data = load_labelled(source, seed=0)
    assert data.classes == ["cat", "dog"]
    assert data.split == "its train and test"
    assert levels(data.train) == [(0, 10), (1, 11), (0, 12), (1, 13)]
    with pytest.raises(UsageError, match="is not a picture"):
        data.test.open(1, 8)


def test_a_saved_dataset_without_classes_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "d", {"train": [(png(1), 0), (png(2), -1)]})
    with pytest.raises(UsageError, match="some rows of a split have no class in kind"):
        load_labelled(source, seed=0)
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "e")
    with pytest.raises(UsageError, match=r"one of type ClassLabel, and has text \(Value\)"):
        load_labelled(str(tmp_path / "e"), seed=0)


def test_what_no_builder_of_datasets_can_read_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")

    def missing(*_: object, **__: object) -> None:
        raise KeyError("a builder's own kind")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    said = "no/where: cannot be loaded from the hub, and there is no such folder .*own kind"
    with pytest.raises(UsageError, match=said):
        load_labelled("no/where", seed=0)


def test_a_row_without_a_picture_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    source = saved(tmp_path / "d", {"train": [(png(1), 0), (png(2), 1)], "test": [(png(3), 0)]})
    there = datasets.load_from_disk(source)
    empty = there["test"].map(lambda row: {"picture": None}, features=there["test"].features)
    datasets.DatasetDict({"train": there["train"], "test": empty}).save_to_disk(tmp_path / "e")
    data = load_labelled(str(tmp_path / "e"), seed=0)
    with pytest.raises(UsageError, match="row 0 has no picture"):
        data.test.open(0, 8)
