"""The `config.json` of AIMv2 encoders in the three layouts of the wild, to and from EncoderConfig.

Refuses numbers that are missing or that no AIMv2 encoder has; runs no code that a config points
to. `model_type: aimv2` stands for two things, told apart by `vision_config`: an encoder of the
first release, and a LiT model, whose encoder is then meant.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..folders import CONFIG_FILE, config_of
from .encoder import SIZES, EncoderConfig
from .timm_layout import from_timm, timm_config

MODEL_TYPES = ("aimv2", "aimv2_vision_model")
REQUIRED_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "rms_norm_eps",
)
# A config within another leaves out what its class has as default: transformers' Aimv2VisionConfig
# and the first release's AIMv2VisionConfig agree on these.
VISION_DEFAULTS = {
    **SIZES["aimv2_large"],
    "image_size": 224,
    "patch_size": 14,
    "rms_norm_eps": 1e-5,
}


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder with AIMv2 weights; UsageError if there is none, or another
    model's."""
    raw = config_of(folder, "give the folder of an AIMv2 encoder")
    if "architecture" in raw and "model_type" not in raw:
        return raw
    if raw.get("model_type") not in MODEL_TYPES:
        raise UsageError(
            f"{folder / CONFIG_FILE} is not an AIMv2 encoder's: its model_type is "
            f"{raw.get('model_type')!r}, and must be one of {', '.join(MODEL_TYPES)}"
        )
    return raw


def is_lit(raw: Mapping[str, Any]) -> bool:
    """Whether `raw` is an image-text (LiT) model's config, and not an encoder's."""
    return "vision_config" in raw


def load_config(folder: Path) -> EncoderConfig:
    """The encoder that the `config.json` in `folder` describes; UsageError as the two beside."""
    return encoder_config(read_config(folder), folder / CONFIG_FILE)


def encoder_config(raw: Mapping[str, Any], path: Path) -> EncoderConfig:
    """The encoder that `raw`, read from `path`, describes; UsageError if it lacks a number or is
    not AIMv2's network."""
    if "architecture" in raw and "model_type" not in raw:
        return from_timm(raw, path)
    if is_lit(raw):
        vision = raw["vision_config"]
        if not isinstance(vision, dict):
            raise UsageError(f"{path}: vision_config is {vision!r}, and must be a config")
        raw = {**VISION_DEFAULTS, **vision}
    demand_plain(raw, path)
    absent = [key for key in REQUIRED_KEYS if key not in raw]
    # The first native release says that it is one by a number of queries in place of an image size.
    native = raw.get("is_native", "image_size" not in raw and "num_queries" in raw)
    if "image_size" not in raw and "num_queries" not in raw:
        absent.append("image_size")
    if absent:
        raise UsageError(f"{path} lacks {', '.join(absent)}: download it again")
    try:
        numbers = {key: raw[key] for key in REQUIRED_KEYS}
        numbers["patch_size"] = patch = _side(raw["patch_size"])
        if "image_size" in raw:
            numbers["image_size"] = _side(raw["image_size"])
        else:
            numbers["image_size"] = math.isqrt(raw["num_queries"]) * patch
        numbers["num_channels"] = raw.get("num_channels", 3)
        return EncoderConfig(**numbers, native=native)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None


def demand_plain(raw: Mapping[str, Any], path: Path) -> None:
    """UsageError for a config with biases or another activation than AIMv2's blocks have."""
    for key, only in (
        ("qkv_bias", False),
        ("use_bias", False),
        ("mlp_bias", False),
        ("hidden_act", "silu"),
    ):
        if raw.get(key, only) != only:
            raise UsageError(f"{path}: {key} is {raw[key]!r}, and AIMv2 has {only!r} only")


def original_config(config: EncoderConfig) -> dict[str, Any]:
    """`config` as the hub's first revisions write it: native ones without an image size."""
    size = {"image_size": config.image_size}
    return {
        "model_type": "aimv2",
        **_sizes(config),
        **({"num_queries": config.num_patches} if config.native else size),
        "patch_size": config.patch_size,
        "rms_norm_eps": config.rms_norm_eps,
        "qkv_bias": False,
        "use_bias": False,
    }


def transformers_config(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` that makes transformers' Aimv2VisionModel the network of `config`."""
    return {
        "architectures": ["Aimv2VisionModel"],
        "model_type": "aimv2_vision_model",
        **_sizes(config),
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "qkv_bias": False,
        "mlp_bias": False,
        "use_head": False,
        "is_native": config.native,
        # From transformers 5.18 on: its last hidden state is the normed one, AIMv2's features.
        "tie_last_hidden_states": True,
    }


# Layout of a folder -> its config.json.
LAYOUTS: dict[str, Callable[[EncoderConfig], dict[str, Any]]] = {
    "original": original_config,
    "transformers": transformers_config,
    "timm": timm_config,
}


def _sizes(config: EncoderConfig) -> dict[str, int]:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_channels": config.num_channels,
    }


def _side(size: Any) -> Any:
    """A side in pixels out of what configs write: a number, or twice the same number."""
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise ValueError(f"AIMv2 sizes are square, not {size}")
        return size[0]
    return size
