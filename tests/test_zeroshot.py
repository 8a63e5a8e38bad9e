"""Zero-shot classification by a stand-in of the two calls that it needs."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from aimv2_mllm.data.questions.labelled import Labelled, LabelledPictures
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation.zeroshot import LitTower, class_vectors, read_templates, zero_shot
from aimv2_mllm.model.preprocessing import Preprocessing

CLASSES = ["red", "dark_green", "blue"]


def letters(texts: list[str]) -> torch.Tensor:
    """Texts as tokens that are letters."""
    rows = [[ord(letter) for letter in text] for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


class Stand(torch.nn.Module):
    """Pictures are their mean colour; texts that name a colour are that, however long."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def encode_image(self, pixel_values):
        return pixel_values.mean((2, 3))

    def encode_text(self, ids):
        texts = ["".join(chr(i) for i in row if i) for row in ids.tolist()]
        self.heard += texts
        colours = ("red", "dark green", "blue")
        found = [[float(colour in text) for colour in colours] for text in texts]
        lengths = torch.tensor([float(len(text)) for text in texts])
        return torch.tensor(found) * lengths[:, None] ** 3


def data(labels: list[int]) -> Labelled:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    part = LabelledPictures(
        labels, lambda i, side: Image.new("RGB", (side, side), colours[labels[i]])
    )
    return Labelled(CLASSES, LabelledPictures([1, 1, 2], part.open), part, "as given")


def test_classes_are_told_by_their_names() -> None:
    tower = LitTower(Stand(), Preprocessing(8, (0.5,) * 3, (0.5,) * 3))
    found = zero_shot(tower, letters, data([0, 1, 2, 2]), ["a {} thing", "{}"])
    assert found["probes"]["zeroshot"]["accuracy"] == 1.0
    assert found["probes"]["zeroshot"]["protocol"]["templates"] == ["a {} thing", "{}"]
    assert found["controls"]["majority"]["right"] == 1  # class 1 is the most frequent in training
    assert found["controls"]["shuffled"]["right"] == 0
    assert tower.model.heard[2:4] == ["a dark green thing", "dark green"]


def test_a_class_is_the_mean_of_its_normalised_prompts() -> None:
    class Long(Stand):
        def encode_text(self, ids):
            return torch.tensor([[3.0, 0.0], [0.0, 0.5], [1.0, 1.0], [1.0, 1.0]])

    vectors = class_vectors(Long(), letters, ["a", "b"], ["{}", "{}!"])
    torch.testing.assert_close(vectors, torch.full((2, 2), 0.5**0.5))


def test_templates_are_lines_with_one_place_for_the_class(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("a photo of a {}.\n\n  {}  \n")
    assert read_templates(file) == ["a photo of a {}.", "{}"]
    for content, why in (("", "is empty"), ("a photo\n", "'a photo' has not one {}")):
        file.write_text(content)
        with pytest.raises(UsageError, match=why):
            read_templates(file)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UsageError, match="it is not UTF-8 text"):
        read_templates(file)
    with pytest.raises(UsageError, match="No such file"):
        read_templates(tmp_path / "absent")
