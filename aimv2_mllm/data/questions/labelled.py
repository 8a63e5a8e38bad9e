"""Pictures with a class each, for probes: the embedded world, class folders, `datasets`.

Owns what is a class and which pictures are for training and which for the test. Refuses a source
without two classes, and leaves decoding to whoever asks for a picture.
"""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.pictures.images import decoded, open_image
from aimv2_mllm.data.rows.tables import load_dataset, picture_bytes
from aimv2_mllm.errors import UsageError, nearest

TEST_SHARE = 0.2  # of each class, where a source has no test split of its own
TRAIN, TESTS = "train", ("test", "val", "validation")  # names of splits; of TESTS the first there
GIVE = (
    "give handwriting, a folder with a folder of pictures for each class (or train/ and test/ of "
    "such), or a dataset of the `datasets` library"
)


@dataclass(frozen=True)
class LabelledPictures:
    """One split: the class of each picture, counted from 0, and how to get picture i.

    `open` takes its index and the side in pixels that is wanted, which a rendered picture has and
    one out of a file need not; it raises UsageError for what is no whole picture.
    """

    labels: Sequence[int]
    open: Callable[[int, int], Image.Image]

    def subset(self, indices: Sequence[int]) -> "LabelledPictures":
        """The pictures of these indices, in this order."""
        chosen = [int(index) for index in indices]
        labels = [self.labels[index] for index in chosen]
        return LabelledPictures(labels, lambda index, side: self.open(chosen[index], side))


@dataclass(frozen=True)
class Labelled:
    """A source: the names of its classes, what to learn from, what to be tested on, and how that
    was split, in words."""

    classes: list[str]
    train: LabelledPictures
    test: LabelledPictures
    split: str


def load_labelled(source: str, *, seed: int, limit: int | None = None) -> Labelled:
    """The labelled pictures called `source`: `handwriting`, a folder, or a hub id of `datasets`.

    `limit` keeps that many pictures of each split at most, drawn with `seed`, as is the split of a
    source that has none. Raises UsageError on what has no classes, only one, or a class in the test
    alone.
    """
    folder = Path(source)
    if source == "handwriting":
        found = handwriting(seed)
    elif folder.is_dir() and not _is_saved_dataset(folder):
        found = _class_folders(folder, seed)
    elif folder.is_dir() or (source.count("/") == 1 and not folder.exists()):
        found = _dataset(source, seed)
    else:
        what = "is a file" if folder.exists() else "there is no such folder"
        raise UsageError(f"{source}: {what}{nearest(source, ['handwriting'])}; {GIVE}")
    if limit is None:
        return found
    train, test = (_limited(part, limit, seed) for part in (found.train, found.test))
    return Labelled(found.classes, train, test, f"{found.split}; of each at most {limit:,}")


def handwriting(seed: int) -> Labelled:
    """Every training scan and every held-out scan of the embedded world, alone on a sheet in an
    ink, place and size of its own that `seed` draws."""
    train, test = (_scans(scenes.split_scans(split), seed) for split in ("train", "heldout"))
    return Labelled([str(value) for value in range(10)], train, test, "the world's own split")


def _scans(scans: np.ndarray, seed: int) -> LabelledPictures:
    def draw(index: int, side: int) -> Image.Image:
        return Image.fromarray(scenes.render(scenes.single_digit(int(scans[index]), seed), side))

    return LabelledPictures(scenes.scans()[1][scans].tolist(), draw)


def _class_folders(folder: Path, seed: int) -> Labelled:
    """`folder`/train/CLASS/… and `folder`/test/CLASS/…, or `folder`/CLASS/… to be split."""
    learned = folder / TRAIN if (folder / TRAIN).is_dir() else folder
    classes, train = _read_classes(learned)
    counts = Counter(train.labels)
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    if len(classes) < 2 or empty:
        what = f"the class {empty[0]} has no pictures" if empty else _too_few(classes)
        raise UsageError(f"{learned}: {what}; {GIVE}")
    test = next((folder / name for name in TESTS if (folder / name).is_dir()), None)
    if test is None or learned == folder:
        return _split(classes, train, seed, str(learned))
    others, pictures = _read_classes(test)
    unknown = [name for name in others if name not in classes]
    if unknown or not pictures.labels:
        what = f"has a class {unknown[0]}, which {learned} has not" if unknown else "has no picture"
        raise UsageError(f"{test}: {what}")
    labels = [classes.index(others[label]) for label in pictures.labels]
    return Labelled(
        classes, train, LabelledPictures(labels, pictures.open), f"its {TRAIN} and {test.name}"
    )


def _read_classes(folder: Path) -> tuple[list[str], LabelledPictures]:
    """The folders in `folder` as classes, by name, and all files in them but hidden ones."""
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [
        (label, file)
        for label, name in enumerate(names)
        for file in sorted((folder / name).rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    ]
    return names, LabelledPictures(
        [label for label, _ in files], lambda i, _: open_image(files[i][1])
    )


def _too_few(classes: Sequence[str]) -> str:
    return f"has one class only, {classes[0]}" if classes else "has no classes"


def _split(classes: list[str], pictures: LabelledPictures, seed: int, source: str) -> Labelled:
    """A fifth of each class for the test, at least one picture and never all, drawn by `seed`."""
    labels = np.array(pictures.labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    held: list[int] = []
    for label, name in enumerate(classes):
        members = order[labels[order] == label]
        if len(members) < 2:
            raise UsageError(f"{source}: the class {name} has one picture; two are the least")
        held += members[: max(1, round(len(members) * TEST_SHARE))].tolist()
    kept = np.setdiff1d(np.arange(len(labels)), held)
    words = f"there is no test split: {TEST_SHARE:.0%} of each class, drawn with seed {seed}"
    return Labelled(classes, pictures.subset(kept.tolist()), pictures.subset(sorted(held)), words)


def _limited(pictures: LabelledPictures, limit: int, seed: int) -> LabelledPictures:
    if len(pictures.labels) <= limit:
        return pictures
    drawn = np.random.default_rng(seed).permutation(len(pictures.labels))[:limit]
    return pictures.subset(sorted(drawn.tolist()))


def _is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote `folder` by save_to_disk: told by the files that it writes."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def _dataset(source: str, seed: int) -> Labelled:
    """A dataset on disk or of a hub, with one column of pictures and one of classes."""
    found = load_dataset(source)
    splits = dict(found) if isinstance(found, dict) else {TRAIN: found}
    if TRAIN not in splits:
        raise UsageError(f"{source}: has no split {TRAIN}, only {', '.join(splits)}")
    test = next((name for name in TESTS if name in splits), None)
    image, label, classes = _columns(splits[TRAIN], source)
    if len(classes) < 2:
        raise UsageError(f"{source}: {_too_few(classes)}; {GIVE}")
    train = _rows(splits[TRAIN], image, label, source)
    if test is None:
        return _split(classes, train, seed, source)
    held = _rows(splits[test], image, label, source)
    return Labelled(classes, train, held, f"its {TRAIN} and {test}")


def _columns(rows: Any, source: str) -> tuple[str, str, list[str]]:
    """The names of the picture and the class column, and the classes."""
    import datasets

    images = [n for n, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    labels = [n for n, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        known = ", ".join(f"{n} ({type(kind).__name__})" for n, kind in rows.features.items())
        raise UsageError(
            f"{source}: needs one column of type Image and one of type ClassLabel, and has {known}"
        )
    return images[0], labels[0], list(rows.features[labels[0]].names)


def _rows(rows: Any, image: str, label: str, source: str) -> LabelledPictures:
    import datasets

    raw = rows.cast_column(image, datasets.Image(decode=False))  # so that a bad one is ours to skip

    def open_row(index: int, _: int) -> Image.Image:
        try:
            return decoded(io.BytesIO(picture_bytes(raw[index][image])))
        except Unusable as error:
            raise UsageError(f"{source}: row {index} {error}") from None

    labels = list(rows[label])
    if any(value is None or value < 0 for value in labels):
        raise UsageError(f"{source}: some rows of a split have no class in {label}: drop these")
    return LabelledPictures(labels, open_row)
