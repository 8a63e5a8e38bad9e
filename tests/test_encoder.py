"""The encoder against the published sizes, against transformers, and against its own promises."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Aimv2VisionConfig, Aimv2VisionModel

from aimv2_mllm.model.encoder import (
    SIZES,
    AIMv2Encoder,
    EncoderConfig,
    aimv2_1b,
    aimv2_3b,
    aimv2_base,
    aimv2_huge,
    aimv2_large,
    aimv2_nano,
)
from aimv2_mllm.model.layouts import transformers_config
from aimv2_mllm.model.namings import NAMINGS, rename
from aimv2_mllm.model.packed import prefix_mask
from aimv2_mllm.model.positions import sincos_positions

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
}


def tiny_encoder(native: bool = False) -> AIMv2Encoder:
    """An encoder of 4 x 4 patches whose every number is random, norms and biases too."""
    torch.manual_seed(0)
    encoder = AIMv2Encoder(EncoderConfig(**TINY, native=native))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return encoder


def transformers_twin(encoder: AIMv2Encoder) -> Aimv2VisionModel:
    """transformers' model with the same weights; eager, since that reads a mask as it is given."""
    config = Aimv2VisionConfig(**transformers_config(encoder.config))
    config._attn_implementation = "eager"
    twin = Aimv2VisionModel(config).eval()
    twin.load_state_dict(rename(encoder.state_dict(), NAMINGS["transformers"]), strict=True)
    return twin


@pytest.mark.parametrize(
    ("build", "image_size", "count"),
    [
        (aimv2_base, 224, 85_603_584),
        (aimv2_large, 224, 309_197_824),
        (aimv2_large, 336, 309_525_504),
        (aimv2_large, 448, 309_984_256),
        (aimv2_huge, 224, 680_851_968),
        (aimv2_huge, 336, 681_343_488),
        (aimv2_huge, 448, 682_031_616),
        (aimv2_1b, 224, 1_234_958_336),
        (aimv2_1b, 336, 1_235_613_696),
        (aimv2_1b, 448, 1_236_531_200),
        (aimv2_3b, 224, 2_720_658_432),
        (aimv2_3b, 336, 2_721_641_472),
        (aimv2_3b, 448, 2_723_017_728),
    ],
)
def test_every_published_size_has_its_published_number_of_parameters(
    build: Callable[..., AIMv2Encoder], image_size: int, count: int
) -> None:
    with torch.device("meta"):
        encoder = build(image_size=image_size)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == count


def test_each_named_size_is_built_from_its_own_row() -> None:
    builders = (aimv2_nano, aimv2_base, aimv2_large, aimv2_huge, aimv2_1b, aimv2_3b)
    assert list(SIZES) == [build.__name__ for build in builders]
    for build in builders:
        with torch.device("meta"):
            config = build(image_size=84, native=True).config
        expected = EncoderConfig(**SIZES[build.__name__], image_size=84, native=True)
        assert config == expected


def test_the_heads_of_every_published_size_are_128_wide() -> None:
    """The number of parameters does not tell how many heads share them."""
    for name, size in SIZES.items():
        width = size["hidden_size"] // size["num_attention_heads"]
        assert width == (64 if name == "aimv2_nano" else 128), name


def test_parameters_bear_the_original_names() -> None:
    names = {name.replace("blocks.0.", "blocks.N.") for name in tiny_encoder().state_dict()}
    assert {name for name in names if "blocks.1" not in name and "blocks.2" not in name} == {
        "preprocessor.patchifier.proj.weight",
        "preprocessor.patchifier.proj.bias",
        "preprocessor.patchifier.norm.weight",
        "preprocessor.pos_embed",
        "trunk.blocks.N.norm_1.weight",
        "trunk.blocks.N.attn.qkv.weight",
        "trunk.blocks.N.attn.proj.weight",
        "trunk.blocks.N.norm_2.weight",
        "trunk.blocks.N.mlp.fc1.weight",
        "trunk.blocks.N.mlp.fc2.weight",
        "trunk.blocks.N.mlp.fc3.weight",
        "trunk.post_trunk_norm.weight",
    }
    assert "preprocessor.pos_embed" not in tiny_encoder(native=True).state_dict()


def test_features_equal_those_of_transformers() -> None:
    encoder, pixels = tiny_encoder(), torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        ours = encoder(pixels)
        theirs = transformers_twin(encoder)(pixels).last_hidden_state
    assert ours.shape == (2, 16, 32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_native_features_equal_those_of_transformers_on_a_grid_that_is_not_square() -> None:
    encoder, pixels = tiny_encoder(native=True), torch.randn(2, 3, 42, 70)
    with torch.no_grad():
        ours = encoder(pixels)
        theirs = transformers_twin(encoder)(pixels).last_hidden_state
    assert ours.shape == (2, 3 * 5, 32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_features_under_a_prefix_equal_those_of_transformers_under_the_same_mask() -> None:
    encoder, pixels = tiny_encoder(), torch.randn(3, 3, 56, 56)
    prefix_length = torch.tensor([1, 7, 16])
    visible = torch.zeros(3, 1, 16, 16)  # added to the attention scores
    for sample, length in enumerate(prefix_length.tolist()):
        for query in range(16):
            for key in range(16):
                if key > query and key >= length:
                    visible[sample, 0, query, key] = float("-inf")
    twin = transformers_twin(encoder)
    with torch.no_grad():
        hidden = twin.embeddings(pixels)
        for layer in twin.encoder.layers:
            hidden = layer(hidden, visible)
        theirs = twin.rms_norm(hidden)
        ours = encoder(pixels, prefix_length)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    # A prefix that is the whole image is the bidirectional encoder; a shorter one is not.
    whole = encoder(pixels)
    torch.testing.assert_close(ours[2], whole[2], rtol=0, atol=1e-5)
    assert (ours[1] - whole[1]).abs().max() > 1e-2


def test_the_norm_of_bfloat16_is_taken_in_float32_as_transformers_does() -> None:
    encoder = tiny_encoder()
    twin, norm = transformers_twin(encoder).rms_norm.bfloat16(), encoder.trunk.post_trunk_norm
    values = (torch.randn(64, 32) * 100).bfloat16()
    assert torch.equal(norm.bfloat16()(values), twin(values))


def test_the_prefix_mask_of_four_patches_is_the_one_written_here() -> None:
    mask = prefix_mask(torch.tensor([1, 3]), 4)
    assert mask.shape == (2, 1, 4, 4)
    assert mask.int().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]],
        [[[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]],
    ]


def test_computed_positions_put_the_column_before_the_row_and_sines_before_cosines() -> None:
    table = sincos_positions(2, 3, 8, torch.device("cpu"), torch.float64)
    column, row = 2.0, 1.0  # the last patch of a grid of 2 rows and 3 columns
    angles = torch.tensor([[column, column / 100], [row, row / 100]], dtype=torch.float64)
    expected = torch.cat([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()])
    torch.testing.assert_close(table[5], expected, rtol=0, atol=1e-12)


def test_positions_first_computed_in_inference_serve_training() -> None:
    encoder, pixels = tiny_encoder(native=True), torch.randn(1, 3, 28, 98)
    with torch.inference_mode():
        encoder(pixels)
    encoder(pixels).sum().backward()
    device, dtype = torch.device("cpu"), torch.float32
    assert not sincos_positions(2, 7, TINY["hidden_size"], device, dtype).is_inference()


def test_new_weights_are_drawn_as_the_authors_draw_them() -> None:
    torch.manual_seed(0)
    encoder = AIMv2Encoder(
        EncoderConfig(hidden_size=96, intermediate_size=160, num_hidden_layers=1,
                      num_attention_heads=2, image_size=84)
    )  # fmt: skip

    def assert_xavier(weight: Tensor, fan_in: int, fan_out: int) -> None:
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.97 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.03

    block = encoder.trunk.blocks[0]
    assert_xavier(encoder.preprocessor.patchifier.proj.weight, 588, 96)
    assert_xavier(block.attn.qkv.weight, 96, 288)
    assert_xavier(block.mlp.fc2.weight, 160, 96)
    assert encoder.preprocessor.patchifier.proj.bias.abs().max() == 0
    assert abs(encoder.preprocessor.pos_embed.std() / 0.02 - 1) < 0.05


def test_an_image_of_another_size_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"56 x 56 .* image has 56 x 70: resize"):
        tiny_encoder()(torch.zeros(1, 3, 56, 70))
    with pytest.raises(ValueError, match=r"42 x 50 .* multiples of 14"):
        tiny_encoder(native=True)(torch.zeros(1, 3, 42, 50))
    with pytest.raises(ValueError, match=r"must be \(batch, 3, height, width\), not"):
        tiny_encoder()(torch.zeros(3, 56, 56))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 60}, "image_size 60 is not a multiple of patch_size 14"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not divisible by num_attention_heads 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, not 0"),
        ({"hidden_size": 32.0}, "hidden_size must be a whole number of at least 1, not 32.0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be above 0"),
        ({"hidden_size": 30, "num_attention_heads": 5, "native": True}, "divisible by 4"),
    ],
)
def test_impossible_numbers_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**(TINY | change))
