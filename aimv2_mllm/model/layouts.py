"""The `config.json` of AIMv2 encoders in the three layouts of the wild, to and from EncoderConfig.

Refuses numbers that are missing or that no AIMv2 encoder has; runs no code that a config points
to. `model_type: aimv2` stands for two things, told apart by `vision_config`: an encoder of the
first release, and a LiT model, whose encoder is then meant.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest
from .encoder import SIZES, EncoderConfig

CONFIG_FILE = "config.json"
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

# What the processors published beside the weights normalise with: CLIP's mean and deviation.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# timm's names of AIMv2 models, and the network of each.
TIMM_MODELS = {
    f"aimv2_{size}_patch14_{pixels}": EncoderConfig(
        **SIZES[f"aimv2_{size}"], image_size=pixels, native=False
    )
    for size in ("large", "huge", "1b", "3b")
    for pixels in (224, 336, 448)
}
# timm's `model_args`, which replace numbers of the named model, and our key of each.
TIMM_ARGS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
}


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder with AIMv2 weights; UsageError if there is none, or another
    model's."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UsageError(f"{folder} has no {CONFIG_FILE}: give the folder of an AIMv2 encoder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not JSON ({error}): download it again") from None
    raw: dict[str, Any] = content if isinstance(content, dict) else {}
    if "architecture" in raw and "model_type" not in raw:
        return raw
    if raw.get("model_type") not in MODEL_TYPES:
        raise UsageError(
            f"{path} is not an AIMv2 encoder's: its model_type is {raw.get('model_type')!r}, "
            f"and must be one of {', '.join(MODEL_TYPES)}"
        )
    return raw


def is_lit(raw: Mapping[str, Any]) -> bool:
    """Whether `raw` is an image-text (LiT) model's config, and not an encoder's."""
    return "vision_config" in raw


def encoder_config(raw: Mapping[str, Any], path: Path) -> EncoderConfig:
    """The encoder that `raw`, read from `path`, describes; UsageError if it lacks a number or is
    not AIMv2's network."""
    if "architecture" in raw and "model_type" not in raw:
        return _from_timm(raw, path)
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


def timm_config(
    config: EncoderConfig,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> dict[str, Any]:
    """`config` in timm's hub format, with the normalisation that timm is to use.

    A network that timm has no name for is its `aimv2_large_patch14_224` with `model_args`. Raises
    UsageError for what timm cannot be told: computed positions, another epsilon.
    """
    if config.native:
        raise UsageError(
            "the timm layout has no native AIMv2: timm's have learned positions, and these are "
            "computed; choose the original or transformers layout"
        )
    if config.rms_norm_eps != 1e-5:
        raise UsageError(
            f"the timm layout has rms_norm_eps 1e-5 only, and this encoder {config.rms_norm_eps}"
        )
    named = next((name for name, other in TIMM_MODELS.items() if other == config), None)
    pixels = config.image_size
    written: dict[str, Any] = {
        "architecture": named or "aimv2_large_patch14_224",
        "num_classes": 0,
        "num_features": config.hidden_size,
        "global_pool": "avg",
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [config.num_channels, pixels, pixels],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if named is None:
        written["model_args"] = {arg: getattr(config, key) for arg, key in TIMM_ARGS.items()}
        written["model_args"]["mlp_ratio"] = _mlp_ratio(config)
    return written


# Layout of a folder -> its config.json.
LAYOUTS: dict[str, Callable[[EncoderConfig], dict[str, Any]]] = {
    "original": original_config,
    "transformers": transformers_config,
    "timm": timm_config,
}


def _from_timm(raw: Mapping[str, Any], path: Path) -> EncoderConfig:
    name, args = raw["architecture"], raw.get("model_args") or {}
    if name not in TIMM_MODELS:
        raise UsageError(
            f"{path} is not an AIMv2 encoder's: its architecture is {name!r}, and must be one of "
            f"{', '.join(TIMM_MODELS)}{nearest(str(name), TIMM_MODELS)}"
        )
    unknown = [arg for arg in args if arg not in TIMM_ARGS and arg != "mlp_ratio"]
    if unknown:
        known = ", ".join([*TIMM_ARGS, "mlp_ratio"])
        raise UsageError(f"{path}: model_args has {unknown[0]}, and may have {known}")
    model = TIMM_MODELS[name]
    numbers = {field.name: getattr(model, field.name) for field in fields(model)}
    try:
        numbers |= {TIMM_ARGS[arg]: _side(args[arg]) for arg in args if arg in TIMM_ARGS}
        if "mlp_ratio" in args:
            numbers["intermediate_size"] = int(numbers["hidden_size"] * args["mlp_ratio"])
        return EncoderConfig(**numbers)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None


def _mlp_ratio(config: EncoderConfig) -> float:
    """The ratio from which timm's int(width * ratio) makes the very width inside SwiGLU."""
    ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * ratio) < config.intermediate_size:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


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
