"""The families of vision towers: how the patch tokens of each are read, and nothing else.

Owns how many tokens of a tower are no patches. Refuses a `model_type` that nobody has looked at:
what stands before the patches is never guessed.

Letters in shapes: B pictures, C channels, R rows and K columns of patches, N = R * K, D width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError, nearest
from .encoder import AIMv2Encoder
from .grids import Grid
from .layouts import MODEL_TYPES

NORMS = ("post", "pre")


class Family(NamedTuple):
    """A kind of tower. `num_others` counts, from its config, the tokens before its patches: class
    token and registers."""

    model_types: tuple[str, ...]  # of config.json, exactly
    model: str  # transformers' class of it
    num_others: Callable[[Any], int]
    norm: str  # the attribute that is its last norm
    usual_norm: str = "post"  # whether its patches are read after the last norm or before
    other_parts: tuple[str, ...] = ()  # what else a checkpoint of such a model_type holds
    # From pixel values (B, C, H, W) and its config: the arguments of its forward.
    arguments: Callable[[Tensor, Any], dict[str, Any]] = lambda pixels, _: {"pixel_values": pixels}


def _resized(pixels: Tensor, config: Any) -> dict[str, Any]:
    side = side_of(config.image_size)
    told = {} if pixels.shape[-2:] == (side, side) else {"interpolate_pos_encoding": True}
    return {"pixel_values": pixels, **told}


def _in_patches(pixels: Tensor, config: Any) -> dict[str, Any]:
    """What NaFlex towers take: flat patches (B, N, P * P * C) in (row, column, channel) order."""
    (batch, channels, height, width), side = pixels.shape, side_of(config.patch_size)
    rows, columns = height // side, width // side
    patches = pixels.reshape(batch, channels, rows, side, columns, side)
    flat = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
    return {
        "pixel_values": flat,
        "pixel_attention_mask": flat.new_ones(flat.shape[:2], dtype=torch.long),
        "spatial_shapes": torch.tensor([[rows, columns]] * batch),
    }


# CLIP's last norm is trained on the class token alone, so its patches are usually read before it.
TOWERS: dict[str, Family] = {
    "aimv2": Family(MODEL_TYPES, "Aimv2VisionModel", lambda _: 0, "rms_norm"),
    "clip": Family(
        ("clip", "clip_vision_model"),
        "CLIPVisionModel",
        lambda _: 1,
        "post_layernorm",
        usual_norm="pre",
        other_parts=("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
        arguments=_resized,
    ),
    "siglip": Family(
        ("siglip", "siglip_vision_model"),
        "SiglipVisionModel",
        lambda _: 0,
        "post_layernorm",
        other_parts=("text_model.", "logit_scale", "logit_bias"),
        arguments=_resized,
    ),
    "siglip2": Family(
        ("siglip2", "siglip2_vision_model"),
        "Siglip2VisionModel",
        lambda _: 0,
        "post_layernorm",
        other_parts=("text_model.", "logit_scale", "logit_bias"),
        arguments=_in_patches,
    ),
    "dinov2": Family(("dinov2",), "Dinov2Model", lambda _: 1, "layernorm"),
    "dinov2_with_registers": Family(
        ("dinov2_with_registers",),
        "Dinov2WithRegistersModel",
        lambda config: 1 + int(config.num_register_tokens),
        "layernorm",
    ),
    "dinov3_vit": Family(
        ("dinov3_vit",),
        "DINOv3ViTModel",
        lambda config: 1 + int(config.num_register_tokens),
        "norm",
    ),
}


def family_of(model_type: str | None, where: str) -> str:
    """The key of the family whose config.json, at `where`, says `model_type`; UsageError if none
    does."""
    for key, family in TOWERS.items():
        if model_type in family.model_types:
            return key
    known = [name for family in TOWERS.values() for name in family.model_types]
    raise UsageError(
        f"{where}: its model_type is {model_type!r}; the known towers are {', '.join(known)}"
        f"{nearest(str(model_type), known)}"
    )


def chosen_layers(layers: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """`layers` as numbers from 0, the embeddings, to `depth`, the last block; negative ones count
    from the end. UsageError for one that is out of range, or none at all."""
    numbers = [layers] if isinstance(layers, int) else [*layers]
    wrong = [n for n in numbers if not isinstance(n, int) or not -depth - 1 <= n <= depth]
    if wrong or not numbers:
        raise UsageError(
            f"layers is {layers!r}, and must be one or several of 0 (the embeddings) to {depth}, "
            f"or -{depth + 1} to -1 from the end"
        )
    return tuple(n % (depth + 1) for n in numbers)


def chosen_norm(norm: str | None, usual: str, layers: Sequence[int], depth: int) -> str:
    """`norm`, or if it is None the `usual` one for the last layer alone and "pre" for others;
    UsageError for what is no norm."""
    if norm is None:
        return usual if tuple(layers) == (depth,) else "pre"
    if norm not in NORMS:
        raise UsageError(f"norm is {norm!r}, and must be one of {', '.join(NORMS)}")
    return norm


def read_patches(
    key: str, module: nn.Module, pixel_values: Tensor, layers: Sequence[int], norm: str
) -> Tensor:
    """The patch tokens (B, N, D * layers) that `module`, of the family `key`, makes of
    `pixel_values`, in raster order: those of each layer side by side.

    With `norm` "post" each layer's tokens go through the last norm. `module` is our own encoder,
    or transformers' with hidden states that are not tied to its last one.
    """
    if isinstance(module, AIMv2Encoder):
        hidden, last_norm, num_others = _own(module, pixel_values, layers)
    else:
        hidden, last_norm, num_others = _foreign(TOWERS[key], module, pixel_values, layers)
    tokens = [state[:, num_others:] for state in hidden]
    if norm == "post":
        tokens = [last_norm(state) for state in tokens]
    rows, columns = grid_of(pixel_values.shape, module.config)
    assert tokens[0].shape[1] == rows * columns, (key, tuple(tokens[0].shape), rows, columns)
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=-1)


def _own(
    encoder: AIMv2Encoder, pixel_values: Tensor, layers: Sequence[int]
) -> tuple[list[Tensor], nn.Module, int]:
    encoder.check(pixel_values)
    states = [encoder.preprocessor(pixel_values)]
    for block in encoder.trunk.blocks[: max(layers)]:  # those behind are not computed
        states.append(block(states[-1]))
    return [states[layer] for layer in layers], encoder.trunk.post_trunk_norm, 0


def _foreign(
    family: Family, module: nn.Module, pixel_values: Tensor, layers: Sequence[int]
) -> tuple[list[Tensor], nn.Module, int]:
    arguments = family.arguments(pixel_values, module.config)
    hidden = module(**arguments, output_hidden_states=True).hidden_states
    # Up to transformers 4 the network of some stands one level deeper.
    last_norm = getattr(module, "vision_model", module).get_submodule(family.norm)
    return [hidden[layer] for layer in layers], last_norm, family.num_others(module.config)


def patch_size_of(module: nn.Module) -> int:
    """The side of a patch of the tower `module`, in pixels."""
    config: Any = module.config
    return side_of(config.patch_size)


def side_of(size: Any) -> int:
    """A side out of what configs write: a number, or twice the same number."""
    sides = {size} if isinstance(size, int) else {*size}
    if len(sides) != 1:
        raise UsageError(f"a tower's pictures and patches must be square, not {size}")
    return int(sides.pop())


def own_size(config: Any) -> int | None:
    """The side of the pictures that a tower was made for, in pixels; None if of no certain one."""
    size = getattr(config, "image_size", None)
    return None if size is None else side_of(size)


def grid_of(shape: Sequence[int], config: Any) -> Grid:
    """Rows and columns of the patches of pixel values of `shape` (..., H, W), by the tower's
    config; UsageError for a rest.

    Of its own size a tower may leave a rest out of sight, as SigLIP does of 384 pixels in patches
    of 14.
    """
    (height, width), side = shape[-2:], side_of(config.patch_size)
    own = own_size(config)
    if (height, width) != (own, own) and (height % side or width % side or not height * width):
        raise UsageError(
            f"pictures of {height} x {width} pixels do not divide into patches of {side} x {side}: "
            f"resize height and width to multiples of {side}"
        )
    return height // side, width // side
