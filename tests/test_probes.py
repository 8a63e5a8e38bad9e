"""Probes of the encoder: neighbours against a naive loop, losses against the naive sum."""

import numpy as np
import pytest
import torch

from aimv2_mllm.data import scenes
from aimv2_mllm.data.tokenizer import train_tokenizer
from aimv2_mllm.evaluation import probes
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, DecoderConfig
from aimv2_mllm.objective import patchify, standardise

CONFIG = EncoderConfig(16, 32, 1, 2, image_size=28)


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
def test_neighbours_are_those_of_a_naive_loop(k: int, temperature: float) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 60)
    bank = random.normal(size=(60, 5)) + np.eye(5)[labels] * 1.2
    queries = random.normal(size=(40, 5)) + np.eye(5)[random.integers(0, 4, 40)] * 1.2
    parts = (torch.from_numpy(part) for part in (bank, labels, queries))
    told = probes.nearest_neighbours(*parts, k=k, temperature=temperature)
    assert told.tolist() == naive_neighbours(bank, labels, queries, k, temperature)


def test_a_bank_smaller_than_k_votes_as_a_whole() -> None:
    bank, labels = torch.eye(2), torch.tensor([0, 1])
    assert probes.nearest_neighbours(bank, labels, torch.tensor([[0.1, 1.0]])).tolist() == [1]


def test_the_probe_asks_all_held_out_scans_of_all_training_scans() -> None:
    asked: list[int] = []

    def features(sheets):
        asked.extend(sheet.digits[0].scan for sheet in sheets)
        return torch.eye(10)[[sheet.digits[0].value for sheet in sheets]]

    examples = probes.digit_examples(features, seed=0)
    assert probes.knn_accuracy(examples) == 1.0
    assert probes.linear_accuracy(examples) == 1.0
    train, heldout = (scenes.split_scans(split).tolist() for split in ("train", "heldout"))
    assert asked == train + heldout
    assert not set(train) & set(heldout)


def test_features_without_knowledge_guess() -> None:
    def features(sheets):
        return torch.ones(len(sheets), 3)

    examples = probes.digit_examples(features, seed=0)
    assert 0.05 < probes.knn_accuracy(examples) < 0.15
    assert 0.05 < probes.linear_accuracy(examples) < 0.15


def test_what_all_features_share_does_not_blur_the_neighbours() -> None:
    def features(sheets):
        digits = torch.eye(10)[[sheet.digits[0].value for sheet in sheets]]
        noise = torch.randn(len(sheets), 10, generator=torch.Generator().manual_seed(0))
        return digits + 0.3 * noise + 1000

    assert probes.knn_accuracy(probes.digit_examples(features, seed=0)) > 0.8


def test_the_linear_classifier_reads_a_direction_that_neighbours_do_not_see() -> None:
    def features(sheets):
        digits = torch.eye(10)[[sheet.digits[0].value for sheet in sheets]]
        noise = torch.randn(len(sheets), 40, generator=torch.Generator().manual_seed(len(sheets)))
        return torch.cat([digits, 3 * noise], dim=1)

    examples = probes.digit_examples(features, seed=0)
    assert probes.linear_accuracy(examples) > 0.9
    assert probes.knn_accuracy(examples) < 0.6


def test_encoder_features_are_the_mean_over_all_patches() -> None:
    encoder = probes.fresh_encoder(CONFIG, 0)
    sheets = [scenes.single_digit(scan, 0) for scan in range(3)]
    preprocessing = Preprocessing(28)
    pixels = preprocessing.normalise(np.stack([scenes.render(sheet, 28) for sheet in sheets]))
    expected = torch.stack([encoder(one[None])[0].mean(0) for one in pixels])
    torch.testing.assert_close(probes.encoder_features(encoder, preprocessing)(sheets), expected)


def test_pixel_features_are_nothing_where_the_paper_is_white() -> None:
    blank = scenes.Scene((255, 255, 255), ())
    assert probes.pixel_features()([blank]).abs().sum() == 0
    assert probes.pixel_features()([scenes.single_digit(0, 0)]).shape == (1, 56 * 56 * 3)


def test_a_fresh_encoder_is_the_seeds_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    weights = [
        probes.fresh_encoder(CONFIG, seed).trunk.blocks[0].mlp.fc1.weight for seed in (0, 0, 1)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_held_out_losses_are_the_naive_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "BATCH_SIZE", 2)
    tokenizer = train_tokenizer([" a red 7 at the top left"], 300)
    torch.manual_seed(0)
    decoder = DecoderConfig(16, 32, 1, 2, vocab_size=len(tokenizer), max_text_tokens=80)
    model = AIMv2ForPreTraining(AIMv2Encoder(CONFIG), decoder).eval()
    sheets = [scenes.scene(0, "heldout", index) for index in range(5)]
    said = probes.held_out_losses(model, tokenizer, Preprocessing(28), sheets, seed=4)

    pixel, flat, caption = [], [], []
    for index, sheet in enumerate(sheets):
        pixels = Preprocessing(28).normalise(scenes.render(sheet, 28)[None])
        prefix = int(scenes.generator(4, "prefix", index).integers(1, 4))
        words = tokenizer(f" {scenes.caption(sheet)}").input_ids[:80]
        patches, guesses = model(
            pixels, torch.tensor([prefix]), torch.tensor([words]), torch.tensor([len(words)])
        )
        targets = standardise(patchify(pixels, 14))[0]
        for patch in range(prefix, 4):
            pixel.append((patches[0, patch - 1] - targets[patch]).square().mean().item())
            flat.append(targets[patch].square().mean().item())
        likely = guesses[0].log_softmax(-1)
        caption += [-likely[t, w].item() for t, w in enumerate([*words, tokenizer.eos_token_id])]
    expected = {"caption_loss": caption, "pixel_loss": pixel, "pixel_loss_flat": flat}
    assert said == pytest.approx({k: sum(v) / len(v) for k, v in expected.items()}, rel=1e-4)
