"""Rows one at a time give what all rows at once give, in the encoder and in the decoder."""

import pytest
import torch

from aimv2_mllm.model.blocks import Block
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.incremental import CachedBlocks, PatchByPatch, WordByWord
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, DecoderConfig
from aimv2_mllm.objective import patchify

PATCH, MAX_WORDS = 14, 7


def drawn(native: bool) -> AIMv2ForPreTraining:
    torch.manual_seed(0)
    config = EncoderConfig(32, 48, 3, 2, image_size=56, native=native)
    decoder = DecoderConfig(48, 64, 3, 3, vocab_size=40, max_text_tokens=MAX_WORDS)
    model = AIMv2ForPreTraining(AIMv2Encoder(config), decoder).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)  # so that rows care for one another
    return model


def pixels(native: bool) -> torch.Tensor:
    return torch.randn(3, 3, 42 if native else 56, 56, generator=torch.Generator().manual_seed(1))


def assert_equal(said: torch.Tensor, expected: torch.Tensor) -> None:
    """Every row within 1e-5 of its own length."""
    assert said.shape == expected.shape
    assert float(((said - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("prefix", [1, 5, 11])
def test_patches_one_by_one_are_those_of_the_whole_model(native: bool, prefix: int) -> None:
    model, pictures = drawn(native), pixels(native)
    patches = patchify(pictures, PATCH)
    count = patches.shape[1]
    lengths, no_words = torch.full((3,), prefix), torch.zeros((3, 0), dtype=torch.int64)
    expected = model(pictures, lengths, no_words, torch.zeros_like(lengths)).patches
    next_patch = PatchByPatch(model, (count // 4, 4))
    said = [next_patch(patches[:, :prefix])]
    said += [next_patch(patches[:, i : i + 1]) for i in range(prefix, count)]
    assert_equal(torch.stack(said, 1), expected[:, prefix - 1 :])


@torch.no_grad()
def test_words_one_by_one_are_those_of_the_whole_model() -> None:
    model, pictures = drawn(False), pixels(False)
    words = torch.randint(40, (3, MAX_WORDS), generator=torch.Generator().manual_seed(2))
    every, lengths = torch.full((3,), 16), torch.full((3,), MAX_WORDS)
    expected = model(pictures, every, words, lengths).words  # (B, T + 1, V)
    saying = WordByWord(model, pictures)
    said = [saying.logits]
    for word in words.T:
        saying.append(word)
        said.append(saying.logits)
    assert_equal(torch.stack(said, 1), expected)


def test_several_rows_behind_the_first_ones_are_refused() -> None:
    blocks = CachedBlocks([Block(16, 32, 2, 1e-5)], 4)
    blocks(torch.zeros(1, 2, 16), is_causal=True)
    with pytest.raises(AssertionError):
        blocks(torch.zeros(1, 2, 16), is_causal=True)


def test_more_rows_than_there_is_room_for_are_refused() -> None:
    blocks = CachedBlocks([Block(16, 32, 2, 1e-5)], 2)
    blocks(torch.zeros(1, 2, 16), is_causal=True)
    with pytest.raises(AssertionError):
        blocks(torch.zeros(1, 1, 16), is_causal=True)
