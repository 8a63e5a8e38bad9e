"""What the pre-training decoder paints and writes: free-running, causal, and strictly loaded."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from aimv2_mllm.data.talks.tokenizer import train_tokenizer
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation import dreams
from aimv2_mllm.evaluation.dreams import (
    load_pretrainer,
    only_prefix,
    paint,
    unpatchify,
    write_caption,
)
from aimv2_mllm.model.decoder_weights import DECODER_FILE
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, DecoderConfig
from aimv2_mllm.model.weights import save_encoder
from aimv2_mllm.objective import patchify

SIDE, PATCH, MAX_WORDS = 42, 14, 6  # 3 x 3 patches


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" a red 7"], 270)


@pytest.fixture(scope="module")
def model(tokenizer) -> AIMv2ForPreTraining:
    torch.manual_seed(0)
    encoder = AIMv2Encoder(EncoderConfig(16, 32, 2, 2, image_size=SIDE))
    decoder = DecoderConfig(16, 32, 2, 2, vocab_size=len(tokenizer), max_text_tokens=MAX_WORDS)
    model = AIMv2ForPreTraining(encoder, decoder).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)  # at their drawn size no patch would care much for another
    return model


def pictures(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def patch_pixels(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    row, column = divmod(patch, SIDE // PATCH)
    return pixels[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]


def test_unpatchify_undoes_patchify() -> None:
    pixels = torch.randn(2, 3, 28, 42)
    assert torch.equal(unpatchify(patchify(pixels, PATCH), pixels), pixels)


@pytest.mark.parametrize("prefix_length", [1, 4, 8])
def test_painting_leaves_the_prefix_as_it_is_and_changes_the_rest(model, prefix_length) -> None:
    pixels = pictures()
    painted = paint(model, pixels, prefix_length)
    for patch in range(9):
        same = torch.equal(patch_pixels(painted, patch), patch_pixels(pixels, patch))
        assert same == (patch < prefix_length)


@torch.no_grad()
def naive_painting(model: AIMv2ForPreTraining, pixels: torch.Tensor, prefix: int) -> torch.Tensor:
    """One picture, one patch at a time, cut out and put back by hand."""
    canvas = pixels.clone()
    no_words = torch.zeros((1, 0), dtype=torch.int64)
    for patch in range(prefix, 9):
        truth = patch_pixels(pixels, patch)
        said = model(canvas, torch.tensor([prefix]), no_words, torch.tensor([0])).patches
        shape = said[0, patch - 1].reshape(PATCH, PATCH, 3).permute(2, 0, 1)
        patch_pixels(canvas, patch)[:] = shape * (truth.var() + 1e-6).sqrt() + truth.mean()
    return canvas


def test_painting_is_the_step_by_step_rendering(model) -> None:
    pixels = pictures()
    alone = torch.cat([naive_painting(model, pixels[i : i + 1], 3) for i in range(2)])
    torch.testing.assert_close(paint(model, pixels, 3), alone, rtol=0, atol=1e-3)


def test_the_truth_after_the_prefix_gives_its_mean_and_deviation_alone(model) -> None:
    pixels, other = pictures(), pictures()
    for patch in range(4, 9):  # another shape of equal mean and deviation
        patch_pixels(other, patch)[:] = patch_pixels(pixels, patch).flip(1, 2, 3).clone()
    assert not torch.equal(pixels, other)
    torch.testing.assert_close(paint(model, other, 4), paint(model, pixels, 4), rtol=0, atol=1e-3)


def test_what_is_painted_is_fed_back(model) -> None:
    pixels, brighter = pictures(), pictures()
    patch_pixels(brighter, 4)[:] += 3  # paints patch 4 brighter, which is a later one's input
    first, second = paint(model, pixels, 4), paint(model, brighter, 4)
    assert not torch.allclose(patch_pixels(first, 6), patch_pixels(second, 6), atol=1e-2)


@pytest.mark.parametrize("prefix_length", [0, 9])
def test_a_prefix_that_leaves_nothing_to_see_or_paint_is_refused(model, prefix_length) -> None:
    with pytest.raises(ValueError, match=r"prefix_length must lie in 1\.\.8"):
        paint(model, pictures(), prefix_length)


class Numbers:
    """A tokenizer whose words are the numbers of its tokens."""

    eos_token_id = 1

    def batch_decode(self, rows: list[tuple[int, ...]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(i) for i in row if i != 1) for row in rows]


def test_captions_are_the_greedy_words_one_by_one(model) -> None:
    loud = AIMv2ForPreTraining(model.encoder, model.decoder_config).eval()
    torch.manual_seed(3)
    for parameter in loud.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    pixels, expected = pictures(6), []
    for picture in pixels:
        words: list[int] = []
        while len(words) < MAX_WORDS:
            ids = torch.tensor([words], dtype=torch.int64).reshape(1, -1)
            said = loud(picture[None], torch.tensor([9]), ids, torch.tensor([len(words)])).words
            words.append(int(said[0, len(words)].argmax()))
            if words[-1] == Numbers.eos_token_id:
                break
        expected += Numbers().batch_decode([tuple(words)], True)
    assert write_caption(loud, pixels, Numbers()) == expected
    assert len(set(expected)) > 1


def test_a_caption_is_over_at_its_end_token(model, monkeypatch) -> None:
    # Picture 0 says 5, end, 6 …; picture 1 says 7, 8, 9, 10, end.
    said = torch.tensor([[5, 1, 6, 6, 6, 6], [7, 8, 9, 10, 1, 6]])

    class Script:
        def __init__(self, *_) -> None:
            self.heard: list[list[int]] = []

        @property
        def logits(self) -> torch.Tensor:
            return torch.nn.functional.one_hot(said[:, len(self.heard)], 20)

        def append(self, words: torch.Tensor) -> None:
            self.heard.append(words.tolist())

    script = Script()
    monkeypatch.setattr(dreams, "WordByWord", lambda *_: script)
    assert write_caption(model, pictures(), Numbers()) == ["5", "7 8 9 10"]
    assert script.heard == [[5, 7], [1, 8], [1, 9], [1, 10]]


@pytest.mark.parametrize(("statistics", "first"), [("previous", 3), ("prefix", 0)])
def test_mean_and_deviation_can_be_those_of_what_is_shown(model, statistics, first) -> None:
    pixels, brighter = pictures(), pictures()
    patch_pixels(brighter, 4)[:] += 3  # after the prefix, so nobody may know it
    painted = paint(model, pixels, 4, statistics)
    assert torch.equal(painted, paint(model, brighter, 4, statistics))
    shown = patchify(pixels, PATCH)[:, first:4]
    means, variances = shown.mean(-1).mean(1), (shown.var(-1) + 1e-6).sqrt().mean(1)
    no_words, length = torch.zeros((2, 0), dtype=torch.int64), torch.tensor([4, 4])
    said = model(pixels, length, no_words, torch.zeros_like(length)).patches[:, 3]
    expected = said * variances[:, None] + means[:, None]
    torch.testing.assert_close(patchify(painted, PATCH)[:, 4], expected, rtol=0, atol=1e-4)


def test_statistics_of_nobody_are_refused(model) -> None:
    with pytest.raises(ValueError, match="one of true, previous, prefix, not 'mine'"):
        paint(model, pictures(), 4, "mine")


def test_only_the_prefix_is_shown() -> None:
    white = np.full((1, SIDE, SIDE, 3), 255, dtype=np.uint8)
    shown = torch.from_numpy(only_prefix(white, 4, PATCH)).permute(0, 3, 1, 2)
    assert [patch_pixels(shown, p).unique().tolist() for p in range(9)] == [[255]] * 4 + [[214]] * 5


def result_folder(model: AIMv2ForPreTraining, tokenizer, folder: Path) -> Path:
    save_encoder(model.encoder, folder)
    Preprocessing(SIDE).save(folder)
    tokenizer.save_pretrained(folder)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("encoder.")}
    about = {"decoder": json.dumps(asdict(model.decoder_config))}
    save_file(state, folder / DECODER_FILE, metadata=about)
    return folder


def test_a_saved_pretrainer_is_loaded_whole(model, tokenizer, tmp_path) -> None:
    loaded, words, preprocessing = load_pretrainer(result_folder(model, tokenizer, tmp_path))
    assert preprocessing.image_size == SIDE
    assert not loaded.training
    assert len(words) == len(tokenizer)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_decoder_that_lacks_a_tensor_is_refused_by_its_name(model, tokenizer, tmp_path) -> None:
    folder = result_folder(model, tokenizer, tmp_path)
    state = load_file(folder / DECODER_FILE)
    del state["start"]
    about = {"decoder": json.dumps(asdict(model.decoder_config))}
    save_file(state, folder / DECODER_FILE, metadata=about)
    with pytest.raises(UsageError, match="start"):
        load_pretrainer(folder)


def test_an_encoder_without_its_decoder_is_refused(model, tokenizer, tmp_path) -> None:
    folder = result_folder(model, tokenizer, tmp_path)
    (folder / DECODER_FILE).unlink()
    with pytest.raises(UsageError, match="pretrain stage"):
        load_pretrainer(folder)


def test_a_file_that_is_no_decoder_is_refused(model, tokenizer, tmp_path) -> None:
    folder = result_folder(model, tokenizer, tmp_path)
    save_file({"start": torch.zeros(1)}, folder / DECODER_FILE)
    with pytest.raises(UsageError, match="no decoder"):
        load_pretrainer(folder)
