"""Probes of a tower: neighbours against a naive loop, what each can tell and what it cannot."""

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.questions.labelled import Labelled, LabelledPictures, handwriting
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation import probes
from aimv2_mllm.evaluation.intervals import wilson_interval
from aimv2_mllm.model.encoder import EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.towers import Tower

CONFIG = EncoderConfig(16, 32, 1, 2, image_size=28)


class Oracle:
    """A tower whose tokens are a function of the picture's first pixel, which holds its class."""

    kind, preprocessing, notes = "oracle", Preprocessing(8), ["all-seeing"]
    module = torch.nn.Linear(2, 2)

    def __init__(self, tokens) -> None:
        self.tokens = tokens

    def prepare(self, pictures):
        return torch.tensor([picture.getpixel((0, 0))[0] for picture in pictures])

    def __call__(self, classes):
        return self.tokens(classes)  # (B, N, D)


def coloured(counts: tuple[int, int], num_classes: int = 10) -> Labelled:
    """Pictures of which each pixel is the number of the class."""

    def part(count: int) -> LabelledPictures:
        labels = [index % num_classes for index in range(count)]
        return LabelledPictures(labels, lambda i, _: Image.new("RGB", (9, 9), (labels[i], 0, 0)))

    train, test = map(part, counts)
    return Labelled([str(i) for i in range(num_classes)], train, test, "as counted")


def accuracies(tokens, kinds=("knn", "linear"), counts=(400, 100)) -> dict[str, float]:
    found = probes.probe(Oracle(tokens), coloured(counts), kinds, seed=0, epochs=20)
    return {kind: score["accuracy"] for kind, score in found["probes"].items()}


def naive_neighbours(bank, labels, queries, k, temperature) -> list[int]:
    told = []
    for query in queries:
        cosines = [row @ query / np.linalg.norm(row) / np.linalg.norm(query) for row in bank]
        votes = np.zeros(labels.max() + 1)
        for index in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            votes[labels[index]] += np.exp(cosines[index] / temperature)
        told.append(int(votes.argmax()))
    return told


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.07), (20, 10.0)])
def test_neighbours_are_those_of_a_naive_loop(
    k: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "TEMPERATURE", temperature)
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 60)
    bank = random.normal(size=(60, 5)) + np.eye(5)[labels] * 1.2
    queries = random.normal(size=(40, 5)) + np.eye(5)[random.integers(0, 4, 40)] * 1.2
    parts = (torch.from_numpy(part) for part in (bank, labels, queries))
    told = probes.nearest_neighbours(*parts, k=k)
    assert told.tolist() == naive_neighbours(bank, labels, queries, k, temperature)


def test_features_that_name_the_class_are_read_by_every_probe() -> None:
    def tokens(classes):
        return torch.eye(10)[classes][:, None].expand(-1, 3, -1)

    found = accuracies(tokens, ("knn", "linear", "attentive"))
    assert found == {"knn": 1.0, "linear": 1.0, "attentive": 1.0}


def test_features_without_knowledge_guess() -> None:
    found = accuracies(lambda classes: torch.ones(len(classes), 3, 12), probes.KINDS)
    assert found.keys() == probes.KINDS.keys()
    assert all(0.05 < share < 0.15 for share in found.values())


def test_what_all_features_share_does_not_blur_the_neighbours() -> None:
    def tokens(classes):
        noise = torch.randn(len(classes), 1, 10, generator=torch.Generator().manual_seed(0))
        return torch.eye(10)[classes][:, None] + 0.3 * noise + 1000

    assert accuracies(tokens)["knn"] > 0.8


def test_the_linear_classifier_reads_a_direction_that_neighbours_do_not_see() -> None:
    random = torch.Generator().manual_seed(0)

    def tokens(classes):
        noise = torch.randn(len(classes), 1, 40, generator=random)
        return torch.cat([torch.eye(10)[classes][:, None], 3 * noise], dim=2)

    found = accuracies(tokens, counts=(1000, 200))
    assert found["linear"] > 0.9
    assert found["knn"] < 0.6


def test_attention_finds_the_one_patch_that_knows() -> None:
    random = torch.Generator().manual_seed(0)

    def tokens(classes):
        patches = 2 * torch.randn(len(classes), 16, 24, generator=random)
        where = torch.randint(16, (len(classes),), generator=random)
        patches[torch.arange(len(classes)), where, :10] = 6 * torch.eye(10)[classes]
        patches[torch.arange(len(classes)), where, 10:] = 6  # by which it is found
        return patches

    found = probes.probe(
        Oracle(tokens), coloured((1000, 200)), ("linear", "attentive"), seed=0, epochs=100
    )["probes"]
    assert found["attentive"]["accuracy"] > 0.9
    assert found["attentive"]["accuracy"] > found["linear"]["accuracy"] + 0.1


def test_the_record_says_how_and_on_what_it_was_found() -> None:
    found = probes.probe(
        Oracle(lambda classes: torch.eye(10)[classes][:, None]),
        coloured((40, 20)), probes.KINDS, seed=3, k=2, epochs=1,
    )  # fmt: skip
    assert found["data"] == {
        "classes": list("0123456789"), "split": "as counted", "train": 40, "test": 20,
        "skipped": {"train": 0, "test": 0},
    }  # fmt: skip
    assert found["tower"]["image_size"] == 8
    assert found["tower"]["notes"] == ["all-seeing"]
    assert len(found["tower"]["sha256"]) == 64
    knn = found["probes"]["knn"]
    assert knn["interval"] == list(wilson_interval(knn["right"], 20))
    assert knn["protocol"]["k"] == 2
    attentive = found["probes"]["attentive"]["protocol"]
    assert attentive["trained_on"] == 30
    assert attentive["chosen"] in [
        {key: one[key] for key in ("lr", "weight_decay")} for one in attentive["sweep"]
    ]
    assert found["controls"]["majority"]["right"] == 2
    assert found["controls"]["pixels"]["count"] == 20


def test_more_neighbours_than_pictures_are_refused() -> None:
    with pytest.raises(UsageError, match="k is 20, and there are only 19 training pictures"):
        accuracies(lambda classes: torch.ones(len(classes), 1, 4), counts=(19, 5))


def test_the_digits_are_all_held_out_scans_told_by_all_training_scans() -> None:
    data = handwriting(seed=0)
    train, heldout = (scenes.split_scans(split) for split in ("train", "heldout"))
    for part, scans in ((data.train, train), (data.test, heldout)):
        assert part.labels == scenes.scans()[1][scans].tolist()
        sheet = scenes.render(scenes.single_digit(int(scans[5]), 0), 40)
        assert np.array_equal(np.asarray(part.open(5, 40)), sheet)
    assert not set(train.tolist()) & set(heldout.tolist())


def test_a_fresh_encoder_is_the_seeds_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    weights = [
        probes.fresh_encoder(CONFIG, seed).trunk.blocks[0].mlp.fc1.weight for seed in (0, 0, 1)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_equal_towers_and_seeds_give_equal_results() -> None:
    tower = Tower("aimv2", probes.fresh_encoder(CONFIG, 0), Preprocessing(28))
    data = coloured((60, 20))
    first, second = (probes.probe(tower, data, probes.KINDS, seed=1, epochs=2) for _ in range(2))
    assert first == second
