"""The `config.json` of timm's hub format, to and from EncoderConfig.

timm has AIMv2 under twelve names; another network is one of these with `model_args`. Refuses what
timm cannot be told: computed positions, another epsilon.
"""

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest
from .encoder import SIZES, EncoderConfig

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


def from_timm(raw: Mapping[str, Any], path: Path) -> EncoderConfig:
    """The encoder that timm's `raw`, read from `path`, describes; UsageError for another network
    than AIMv2's."""
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
        numbers |= {TIMM_ARGS[arg]: args[arg] for arg in args if arg in TIMM_ARGS}
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
