"""The pre-training model: its size, who may see what, and the fast path."""

import pytest
import torch
from torch import Tensor

from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig, aimv2_large
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, DecoderConfig, Predictions

NUM_PATCHES, VOCABULARY = 9, 11  # 3 x 3 patches


def tiny_model(num_layers: int = 2) -> AIMv2ForPreTraining:
    torch.manual_seed(0)
    encoder = AIMv2Encoder(EncoderConfig(16, 24, num_layers, 2, image_size=42))
    return AIMv2ForPreTraining(encoder, DecoderConfig(24, 32, num_layers, 3, VOCABULARY, 5))


def tiny_batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "pixel_values": torch.randn(4, 3, 42, 42),
        "prefix_length": torch.tensor([1, 4, 8, 9]),
        "caption_ids": torch.randint(VOCABULARY, (4, 5)),
        "caption_length": torch.tensor([5, 0, 1, 3]),
    }


def with_patch_redrawn(pixel_values: Tensor, patch: int) -> Tensor:
    row, column = divmod(patch, 3)
    changed = pixel_values.clone()
    area = changed[..., row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
    area.copy_(torch.randn_like(area))
    return changed


def moved(before: Tensor, after: Tensor) -> list[list[bool]]:
    """For each sample and row: did any number of the row change by more than rounding?"""
    return ((before - after).abs().amax(-1) > 1e-5).tolist()


@torch.no_grad()
def predict(model: AIMv2ForPreTraining, batch: dict[str, Tensor], **changes: Tensor) -> Predictions:
    return model(**(batch | changes))


def test_the_model_on_the_large_encoder_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = AIMv2ForPreTraining(aimv2_large(), DecoderConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 530_632_704


def test_a_scored_patch_is_predicted_from_all_patches_before_it_and_from_no_other() -> None:
    model, batch = tiny_model(), tiny_batch()
    before = predict(model, batch).patches
    assert before.shape == (4, NUM_PATCHES, 588)
    num_checked = 0
    for changed in range(NUM_PATCHES):
        pixels = with_patch_redrawn(batch["pixel_values"], changed)
        has_moved = moved(before, predict(model, batch, pixel_values=pixels).patches)
        for sample, prefix_length in enumerate(batch["prefix_length"].tolist()):
            for target in range(prefix_length, NUM_PATCHES):
                # Patch i is predicted at position i - 1.
                assert has_moved[sample][target - 1] == (changed < target), (changed, target)
                num_checked += 1
    assert num_checked == NUM_PATCHES * (8 + 5 + 1 + 0)


def test_inside_the_prefix_a_position_sees_the_patch_that_it_would_predict() -> None:
    """Which is why the patches of the prefix are not scored."""
    model, batch = tiny_model(), tiny_batch()
    pixels = with_patch_redrawn(batch["pixel_values"], 2)
    before = predict(model, batch).patches
    has_moved = moved(before, predict(model, batch, pixel_values=pixels).patches)
    assert [rows[1] for rows in has_moved] == [False, True, True, True]


def test_a_word_is_predicted_from_all_patches_and_all_words_before_it() -> None:
    model, batch = tiny_model(), tiny_batch()
    batch["caption_length"] = torch.tensor([5, 5, 5, 5])
    before = predict(model, batch)
    assert before.words.shape == (4, 6, VOCABULARY)
    for changed in range(5):
        ids = batch["caption_ids"].clone()
        ids[:, changed] = (ids[:, changed] + 1) % VOCABULARY
        after = predict(model, batch, caption_ids=ids)
        # Row t predicts token t: it moves with the tokens before t only.
        assert moved(before.words, after.words) == [[changed < row for row in range(6)]] * 4
        assert torch.equal(before.patches, after.patches)
    for changed in range(NUM_PATCHES):
        pixels = with_patch_redrawn(batch["pixel_values"], changed)
        after = predict(model, batch, pixel_values=pixels)
        assert moved(before.words, after.words) == [[True] * 6] * 4


def test_what_stands_in_the_padding_does_not_matter() -> None:
    model, batch = tiny_model(), tiny_batch()
    ids = batch["caption_ids"].clone()
    for sample, length in enumerate(batch["caption_length"].tolist()):
        ids[sample, length:] = torch.tensor([-100, VOCABULARY, 10**6, 3, 0])[: 5 - length]
    before, after = predict(model, batch), predict(model, batch, caption_ids=ids)
    assert torch.equal(before.patches, after.patches)
    for sample, length in enumerate(batch["caption_length"].tolist()):
        assert torch.equal(before.words[sample, : length + 1], after.words[sample, : length + 1])


def test_scored_rows_alone_equal_the_same_rows_of_all() -> None:
    model, batch = tiny_model(), tiny_batch()
    everything, scored = model(**batch), model(**batch, scored_only=True)
    patches, words = [], []
    for sample in range(4):
        for target in range(int(batch["prefix_length"][sample]), NUM_PATCHES):
            patches.append(everything.patches[sample, target - 1])
        for token in range(int(batch["caption_length"][sample]) + 1):
            words.append(everything.words[sample, token])
    assert scored.patches.shape == (8 + 5 + 1 + 0, 588)
    assert scored.words.shape == (6 + 1 + 2 + 4, VOCABULARY)
    torch.testing.assert_close(scored.patches, torch.stack(patches), rtol=0, atol=1e-6)
    torch.testing.assert_close(scored.words, torch.stack(words), rtol=0, atol=1e-6)


def test_the_image_part_gets_no_positions_and_the_text_part_its_own() -> None:
    model, batch = tiny_model(num_layers=1), tiny_batch()
    before = predict(model, batch)
    with torch.no_grad():
        model.text_positions[0] += 1
    after = predict(model, batch)
    assert torch.equal(before.patches, after.patches)
    assert moved(before.words, after.words) == [[True] * 6] * 4
    with torch.no_grad():
        model.text_positions[3] += 1
    later = predict(model, batch)
    assert moved(after.words, later.words) == [[False] * 3 + [True] * 3] * 4


def test_new_weights_are_drawn_as_the_authors_draw_them() -> None:
    torch.manual_seed(0)
    encoder = AIMv2Encoder(EncoderConfig(16, 24, 1, 2, image_size=42))
    model = AIMv2ForPreTraining(encoder, DecoderConfig(128, 96, 3, 4, 1000))
    std = (1 / (1 + 3) / 128) ** 0.5
    for weight in (model.patch_head.weight, model.word_head.weight):
        assert abs(weight.std() / std - 1) < 0.02
        assert weight.abs().max() < 2.3 * std  # cut; a normal's largest of 75,000 is beyond 4
    assert abs(model.text_embedding.weight.std() / 0.02 - 1) < 0.02
    assert abs(model.text_positions.std() / 0.01 - 1) < 0.05
    bound = (6 / (16 + 128)) ** 0.5
    assert 0.97 * bound < model.projection.weight.abs().max() <= bound
    assert model.projection.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_length": [0, 1, 1, 1]}, r"prefix_length must lie in 1..9, and is 0"),
        ({"prefix_length": [1, 1, 1, 10]}, r"prefix_length must lie in 1..9, and is 10"),
        ({"caption_length": [0, 0, 0, -1]}, r"caption_length must lie in 0..5, and is -1"),
        ({"caption_length": [6, 0, 0, 0]}, r"caption_length must lie in 0..5, and is 6"),
        ({"caption_ids": [[0] * 6] * 4}, r"captions of 6 tokens do not fit max_text_tokens 5"),
    ],
)
def test_lengths_out_of_range_are_refused(changes: dict[str, list[int]], message: str) -> None:
    tensors = {name: torch.tensor(value) for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        tiny_model()(**(tiny_batch() | tensors))


def test_impossible_decoders_are_refused() -> None:
    with pytest.raises(
        ValueError, match="hidden_size 24 is not divisible by num_attention_heads 5"
    ):
        DecoderConfig(hidden_size=24, num_attention_heads=5)
    with pytest.raises(ValueError, match="vocab_size must be above 0, not 0"):
        DecoderConfig(vocab_size=0)
