"""The config.json of timm's hub format: to timm's names and back, to the last number."""

from pathlib import Path

import pytest
from test_namings import tiny_encoder
from test_weights import change_config

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.encoder import SIZES, EncoderConfig
from aimv2_mllm.model.layouts import encoder_config
from aimv2_mllm.model.timm_layout import TIMM_MODELS, timm_config
from aimv2_mllm.model.weights import load_encoder, save_encoder


def test_the_timm_names_are_the_twelve_that_timm_has() -> None:
    names = "large_patch14_224 large_patch14_336 large_patch14_448 huge_patch14_224"
    names += " huge_patch14_336 huge_patch14_448 1b_patch14_224 1b_patch14_336 1b_patch14_448"
    names += " 3b_patch14_224 3b_patch14_336 3b_patch14_448"
    assert list(TIMM_MODELS) == [f"aimv2_{name}" for name in names.split()]


def test_a_network_that_timm_names_is_written_by_that_name() -> None:
    config = EncoderConfig(**SIZES["aimv2_huge"], image_size=336)
    written = timm_config(config)
    assert written["architecture"] == "aimv2_huge_patch14_336"
    assert "model_args" not in written
    assert written["num_features"] == 1536
    assert written["pretrained_cfg"]["input_size"] == [3, 336, 336]
    assert encoder_config(written, Path("config.json")) == config


@pytest.mark.parametrize("width", [16, 24, 100, 768, 1000])
def test_a_network_without_a_timm_name_is_told_to_timm_to_the_last_number(width: int) -> None:
    for hidden in range(width, 4 * width, 7):
        config = EncoderConfig(width, hidden, 2, 2, image_size=70)
        written = timm_config(config)
        assert written["architecture"] == "aimv2_large_patch14_224"
        # timm's own arithmetic
        assert int(width * written["model_args"]["mlp_ratio"]) == hidden
        assert encoder_config(written, Path("config.json")) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "aimv2_large_patch16_224"}, "did you mean aimv2_large_patch14_224"),
        ({"model_args": {"class_token": True}}, "model_args has class_token, and may have img_"),
        (
            {"model_args": {"img_size": [56, 70]}},
            r"image_size must be a whole number .*\[56, 70\]",
        ),
        ({"model_args": {"depth": 0}}, "num_hidden_layers must be a whole number"),
    ],
)
def test_a_timm_config_of_something_else_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    save_encoder(tiny_encoder(), tmp_path, layout="timm")
    change_config(tmp_path, **changes)
    with pytest.raises(UsageError, match=message):
        load_encoder(tmp_path)
