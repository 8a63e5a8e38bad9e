"""Reading and writing LiT models, strictly: in the first release's naming and in transformers'.

Refuses an encoder alone, and a checkpoint whose tensors do not fit its `config.json`.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError, nearest
from ..folders import CONFIG_FILE
from .hub import locate
from .layouts import (
    demand_plain,
    encoder_config,
    is_lit,
    original_config,
    read_config,
    transformers_config,
)
from .lit import INITIAL_TEMPERATURE, AIMv2LiT, LiTConfig, TextConfig
from .namings import LIT_NAMINGS, naming_of, rename_lit, restore_lit
from .shards import demand_fit, read_tensors, write_json, write_tensors


def load_lit(source: str | Path, *, revision: str | None = None) -> AIMv2LiT:
    """The LiT model of a folder or hub id, on the CPU and in the files' own dtype.

    Reads the naming of the first release and transformers'. Raises UsageError on anything but a
    whole LiT model.
    """
    folder = locate(source, revision)
    raw, path = read_config(folder), folder / CONFIG_FILE
    if not is_lit(raw) or "text_config" not in raw:
        raise UsageError(
            f"{path} describes an encoder alone, without a text tower: load_encoder reads it, "
            "load_lit needs a LiT checkpoint such as apple/aimv2-large-patch14-224-lit"
        )
    with torch.device("meta"):
        model = AIMv2LiT(_lit_config(raw, path))
    tensors = read_tensors(folder)
    try:
        key, _ = naming_of(tensors)
        if key not in LIT_NAMINGS:
            raise UsageError(f"there are no LiT checkpoints in {key} naming")
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from None
    demand_fit(tensors, rename_lit(model.state_dict(), key), folder)
    model.load_state_dict(restore_lit(tensors, key), strict=True, assign=True)
    return model


def save_lit(model: AIMv2LiT, folder: str | Path, *, layout: str = "transformers") -> None:
    """Write `model` to `folder`, made if need be: as transformers' Aimv2Model, or with layout
    `original` as the first release."""
    if layout not in LIT_NAMINGS:
        known = ", ".join(LIT_NAMINGS)
        hint = "; timm has no LiT models" if layout == "timm" else nearest(layout, LIT_NAMINGS)
        raise UsageError(f"layout is {layout!r}, and must be one of {known}{hint}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    write_tensors(rename_lit(state, layout), folder)
    write_json(folder / CONFIG_FILE, _raw_config(model.config, layout))


def _lit_config(raw: dict[str, Any], path: Path) -> LiTConfig:
    text = raw["text_config"]
    if not isinstance(text, dict):
        raise UsageError(f"{path}: text_config is {text!r}, and must be a config")
    demand_plain(text, path)
    numbers = {name: text[name] for name in asdict(TextConfig()) if name in text}
    if "max_context_length" in text:  # the first release's word
        numbers["max_position_embeddings"] = text["max_context_length"]
    # What is left out is as the classes of both layouts have it, but for the projection's width,
    # which is 768 in the first release and 512 in transformers.
    if "projection_dim" not in raw:
        raise UsageError(f"{path} lacks projection_dim: download it again")
    vision = encoder_config(raw, path)
    try:
        scale = float(raw.get("max_logit_scale", 100.0))
        return LiTConfig(vision, TextConfig(**numbers), raw["projection_dim"], scale)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None


def _raw_config(config: LiTConfig, layout: str) -> dict[str, Any]:
    """`config` as the `config.json` of either layout."""
    text = asdict(config.text)
    shared = {"projection_dim": config.projection_dim, "max_logit_scale": config.max_logit_scale}
    if layout == "original":
        text["max_context_length"] = text.pop("max_position_embeddings")
        plain = {"model_type": "aimv2", "qkv_bias": False, "use_bias": False}
        return {
            "model_type": "aimv2",
            **shared,
            "init_temperature": INITIAL_TEMPERATURE,
            "vision_config": original_config(config.vision),
            "text_config": text | plain,
        }
    vision = {k: v for k, v in transformers_config(config.vision).items() if k != "architectures"}
    plain = {"model_type": "aimv2_text_model", "qkv_bias": False, "mlp_bias": False}
    return {
        "architectures": ["Aimv2Model"],
        "model_type": "aimv2",
        **shared,
        "logit_scale_init_value": math.log(1 / INITIAL_TEMPERATURE),
        "vision_config": vision | {"use_head": True},
        "text_config": text | plain | {"hidden_act": "silu"},
    }
