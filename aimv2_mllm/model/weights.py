"""Reading and writing AIMv2 encoders as folders of `config.json` and `model.safetensors`, strictly.

Owns the namings of AIMv2 weights in the wild and the shapes of their configs. A tensor that is
missing, left over or of another shape is an error that names it; nothing is guessed from a path,
and no remote code is run.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UsageError
from .encoder import AIMv2Encoder, EncoderConfig

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"

# `model_type` in config.json -> how the tensors beside it are named.
NAMINGS = {"aimv2": "original", "aimv2_vision_model": "transformers"}

# Original name -> transformers' name. Two are more than a renaming: `POSITIONS` loses its first
# axis, and `qkv` of a block is `q_proj`, `k_proj` and `v_proj` on top of each other.
POSITIONS = "preprocessor.pos_embed"
OUTER_NAMES = {
    "preprocessor.patchifier.proj.weight": "embeddings.patch_embed.weight",
    "preprocessor.patchifier.proj.bias": "embeddings.patch_embed.bias",
    "preprocessor.patchifier.norm.weight": "embeddings.rms_norm.weight",
    POSITIONS: "embeddings.position_embedding.weight",
    "trunk.post_trunk_norm.weight": "rms_norm.weight",
}
BLOCK_NAMES = {
    "norm_1.weight": "rms_norm1.weight",
    "attn.proj.weight": "attention.out_proj.weight",
    "norm_2.weight": "rms_norm2.weight",
    "mlp.fc1.weight": "ffn.gate_proj.weight",
    "mlp.fc2.weight": "ffn.down_proj.weight",
    "mlp.fc3.weight": "ffn.up_proj.weight",
}
REQUIRED_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "rms_norm_eps",
)
BLOCK, LAYER = "trunk.blocks.", "encoder.layers."
QKV, SPLIT_QKV = "attn.qkv.weight", tuple(f"attention.{x}_proj.weight" for x in "qkv")


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` (original naming) in transformers' naming, bit for bit.

    Raises UsageError on a name that is not an AIMv2 encoder's.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        number, _, inner = name.removeprefix(BLOCK).partition(".")
        if name == POSITIONS:
            renamed[OUTER_NAMES[name]] = tensor.squeeze(0)  # (1, N, D) -> (N, D)
        elif name in OUTER_NAMES:
            renamed[OUTER_NAMES[name]] = tensor
        elif name.startswith(BLOCK) and inner == QKV:
            parts = zip(SPLIT_QKV, tensor.chunk(3), strict=True)
            renamed |= {f"{LAYER}{number}.{inner}": part for inner, part in parts}
        elif name.startswith(BLOCK) and inner in BLOCK_NAMES:
            renamed[f"{LAYER}{number}.{BLOCK_NAMES[inner]}"] = tensor
        else:
            raise UsageError(f"{name} is not a tensor of an AIMv2 encoder in the original naming")
    return renamed


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` (transformers' naming, no head) in the original one, bit for bit.

    Raises UsageError on a name that is not an AIMv2 encoder's, and on a query, key or value matrix
    that stands alone.
    """
    outer = {new: old for old, new in OUTER_NAMES.items()}
    block = {new: old for old, new in BLOCK_NAMES.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        number, _, inner = name.removeprefix(LAYER).partition(".")
        if outer.get(name) == POSITIONS:
            renamed[POSITIONS] = tensor.unsqueeze(0)  # (N, D) -> (1, N, D)
        elif name in outer:
            renamed[outer[name]] = tensor
        elif name.startswith(LAYER) and inner in SPLIT_QKV:
            parts = [f"{LAYER}{number}.{part}" for part in SPLIT_QKV]
            absent = [part for part in parts if part not in state]
            if absent:
                raise UsageError(f"{name} is there, and {', '.join(absent)} is missing")
            if inner == SPLIT_QKV[0]:
                renamed[f"{BLOCK}{number}.{QKV}"] = torch.cat([state[part] for part in parts])
        elif name.startswith(LAYER) and inner in block:
            renamed[f"{BLOCK}{number}.{block[inner]}"] = tensor
        else:
            raise UsageError(f"{name} is not a tensor of an AIMv2 encoder in transformers' naming")
    return renamed


def transformers_config(config: EncoderConfig) -> dict[str, Any]:
    """The `config.json` that makes transformers' Aimv2VisionModel the network of `config`."""
    return {
        "architectures": ["Aimv2VisionModel"],
        "model_type": "aimv2_vision_model",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_channels": config.num_channels,
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


def save_encoder(encoder: AIMv2Encoder, folder: str | Path) -> None:
    """Write `encoder` to `folder`, made if need be, in the original naming and config.

    Each file is written under another name and then renamed: an encoder may be saved where it was
    loaded from, and loading maps the file into memory.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().contiguous() for name, tensor in encoder.state_dict().items()}
    part = folder / f"{WEIGHTS_FILE}.part"
    save_file(state, part, metadata={"format": "pt"})
    os.replace(part, folder / WEIGHTS_FILE)
    part = folder / f"{CONFIG_FILE}.part"
    part.write_text(json.dumps(_original_config(encoder.config), indent=2) + "\n")
    os.replace(part, folder / CONFIG_FILE)


def load_encoder(folder: str | Path) -> AIMv2Encoder:
    """The encoder in `folder`, on the CPU and in the file's own dtype.

    Reads original and transformers naming. Raises UsageError, with what to do, on anything but a
    whole AIMv2 encoder: see the module's docstring.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    naming = NAMINGS[raw["model_type"]]
    with torch.device("meta"):
        encoder = AIMv2Encoder(_encoder_config(raw, folder / CONFIG_FILE))
    state, expected = _read_weights(folder / WEIGHTS_FILE), encoder.state_dict()
    _compare(state, expected if naming == "original" else to_transformers(expected), folder)
    if naming == "transformers":
        state = from_transformers(state)
    encoder.load_state_dict(state, strict=True, assign=True)
    return encoder


def _original_config(config: EncoderConfig) -> dict[str, Any]:
    """`config` as the hub's first revisions write it: native ones without an image size."""
    return {
        "model_type": "aimv2",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_channels": config.num_channels,
        **(
            {"num_queries": config.num_patches}
            if config.native
            else {"image_size": config.image_size}
        ),
        "patch_size": config.patch_size,
        "rms_norm_eps": config.rms_norm_eps,
        "qkv_bias": False,
        "use_bias": False,
    }


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder: give one that holds {CONFIG_FILE} and {WEIGHTS_FILE} "
            "(download a hub repository first)"
        )
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UsageError(f"{folder} has no {CONFIG_FILE}: give the folder of an AIMv2 encoder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}): download it again") from error
    raw: dict[str, Any] = content if isinstance(content, dict) else {}
    kind = raw.get("model_type")
    if kind not in NAMINGS:
        raise UsageError(
            f"{path} is not an AIMv2 encoder's: its model_type is {kind!r}, "
            f"and must be one of {', '.join(NAMINGS)}"
        )
    if "vision_config" in raw:
        raise UsageError(
            f"{path} describes an image-text (LiT) model: give the folder of an encoder alone"
        )
    return raw


def _encoder_config(raw: dict[str, Any], path: Path) -> EncoderConfig:
    """`raw` as an EncoderConfig; UsageError if it lacks a number or is not AIMv2's network."""
    for key, only in (
        ("qkv_bias", False),
        ("use_bias", False),
        ("mlp_bias", False),
        ("hidden_act", "silu"),
    ):
        if raw.get(key, only) != only:
            raise UsageError(
                f"{path}: {key} is {raw[key]!r}, and AIMv2 encoders have {only!r} only"
            )
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
        raise UsageError(f"{path}: {error}") from error


def _side(size: Any) -> Any:
    """A side in pixels out of what configs write: a number, or twice the same number."""
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise ValueError(f"AIMv2 sizes are square, not {size}")
        return size[0]
    return size


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UsageError(
            f"{path.parent} has no {path.name}: the weights must be one file of that name"
        )
    try:
        state: dict[str, Tensor] = load_file(path)
        return state
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is cut off or not a safetensors file ({error}): download it again"
        ) from error


def _compare(state: dict[str, Tensor], expected: dict[str, Tensor], folder: Path) -> None:
    """UsageError naming what in `state` is missing, left over or not shaped as `expected`."""
    faults = [f"{name} is missing" for name in expected if name not in state]
    faults += [f"{name} is left over" for name in state if name not in expected]
    faults += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UsageError(
            f"{folder / WEIGHTS_FILE} does not fit the {CONFIG_FILE} beside it: "
            f"{'; '.join(faults[:5])}{more}"
        )
