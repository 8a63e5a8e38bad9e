"""The names that AIMv2's tensors bear in the wild, as tables, and the renaming between them.

Ours are those of the original release. Renaming copies nothing it need not, loses nothing and
invents nothing: a name that no table has is an error.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UsageError

State = dict[str, Tensor]

BLOCKS = {"original": "trunk.blocks.", "transformers": "encoder.layers.", "timm": "blocks."}
POSITIONS = "preprocessor.pos_embed"  # (1, N, D); in transformers (N, D)
NORM = "trunk.post_trunk_norm.weight"

# Columns: original (ours), transformers, timm.
PATCH = "preprocessor.patchifier"
OUTER = (
    (f"{PATCH}.proj.weight", "embeddings.patch_embed.weight", "patch_embed.proj.weight"),
    (f"{PATCH}.proj.bias", "embeddings.patch_embed.bias", "patch_embed.proj.bias"),
    (f"{PATCH}.norm.weight", "embeddings.rms_norm.weight", "patch_embed.norm.weight"),
    (POSITIONS, "embeddings.position_embedding.weight", "pos_embed"),
    (NORM, "rms_norm.weight", "norm.weight"),
)
# Within a block. Where transformers has three, ours is theirs on top of each other.
QKV = ("attention.q_proj.weight", "attention.k_proj.weight", "attention.v_proj.weight")
INNER = (
    ("norm_1.weight", ("rms_norm1.weight",), ("norm1.weight",)),
    ("attn.qkv.weight", QKV, ("attn.qkv.weight",)),
    ("attn.proj.weight", ("attention.out_proj.weight",), ("attn.proj.weight",)),
    ("norm_2.weight", ("rms_norm2.weight",), ("norm2.weight",)),
    ("mlp.fc1.weight", ("ffn.gate_proj.weight",), ("mlp.fc1_g.weight",)),
    ("mlp.fc2.weight", ("ffn.down_proj.weight",), ("mlp.fc2.weight",)),
    ("mlp.fc3.weight", ("ffn.up_proj.weight",), ("mlp.fc1_x.weight",)),
)
# LiT checkpoints have more, and timm has none of them. Columns: original (ours), transformers.
HEAD = "head."
HEAD_NAMES = (
    ("head.cls_token", "head.cls_token"),
    ("head.k.weight", "head.k_proj.weight"),
    ("head.v.weight", "head.v_proj.weight"),
    ("head.linear.weight", "head.output_proj.weight"),
    ("head.linear.bias", "head.output_proj.bias"),
)
TEXT_NAMES = (
    ("preprocessor.text_embedding.weight", "embeddings.token_embedding.weight"),
    ("preprocessor.positional_embedding", "embeddings.position_embedding.weight"),
    (NORM, "rms_norm.weight"),
)
LIT_NAMES = (
    ("image_projector.weight", "visual_projection.weight"),
    ("text_projector.weight", "text_projection.weight"),
    ("log_logit_scale", "logit_scale"),
)
IMAGE = {"original": "image_encoder.", "transformers": "vision_model."}
TEXT = {"original": "text_encoder.", "transformers": "text_model."}


@dataclass(frozen=True)
class Naming:
    """One naming: its words before a block's number, and its names by ours, outside of the blocks
    and within one."""

    key: str
    blocks: str
    outer: Mapping[str, str]
    inner: Mapping[str, tuple[str, ...]]


def _encoder_naming(key: str, column: int) -> Naming:
    outer = {row[0]: row[column] for row in OUTER}
    inner = {row[0]: ((row[0],), *row[1:])[column] for row in INNER}
    return Naming(key, BLOCKS[key], outer, inner)


def _lit_namings(key: str, column: int) -> dict[str, tuple[str, Naming]]:
    encoder = NAMINGS[key]
    head = {row[0]: row[column] for row in HEAD_NAMES}
    text = {row[0]: row[column] for row in TEXT_NAMES}
    rest = {row[0]: row[column] for row in LIT_NAMES}
    return {
        IMAGE["original"]: (IMAGE[key], replace(encoder, outer={**encoder.outer, **head})),
        TEXT["original"]: (TEXT[key], replace(encoder, outer=text)),
        "": ("", replace(encoder, outer=rest, inner={})),
    }


# The namings of an encoder.
NAMINGS = {key: _encoder_naming(key, column) for column, key in enumerate(BLOCKS)}
# Those of a LiT checkpoint: our prefix -> their prefix, and the naming behind it.
LIT_NAMINGS = {key: _lit_namings(key, column) for column, key in enumerate(IMAGE)}


def rename(state: Mapping[str, Tensor], naming: Naming) -> State:
    """The tensors of `state`, which bears our names, under those of `naming`, bit for bit.

    Raises UsageError on a name that the naming's table does not have.
    """
    renamed: State = {}
    for name, tensor in state.items():
        number, _, inner = name.removeprefix(BLOCKS["original"]).partition(".")
        if name in naming.outer:
            renamed[naming.outer[name]] = _positions(name, tensor, naming, ours=False)
        elif name.startswith(BLOCKS["original"]) and inner in naming.inner:
            theirs = naming.inner[inner]
            parts = [tensor] if len(theirs) == 1 else tensor.chunk(len(theirs))
            names = [f"{naming.blocks}{number}.{one}" for one in theirs]
            renamed.update(zip(names, parts, strict=True))
        else:
            raise UsageError(f"{name} is not a tensor of AIMv2 in the original naming")
    return renamed


def restore(state: Mapping[str, Tensor], naming: Naming) -> State:
    """The tensors of `state`, which bears the names of `naming`, under ours, bit for bit.

    Raises UsageError on a name that the naming's table does not have, and on a query, key or value
    matrix that stands alone.
    """
    outer = {theirs: ours for ours, theirs in naming.outer.items()}
    inner = {one: ours for ours, theirs in naming.inner.items() for one in theirs}
    restored: State = {}
    for name, tensor in state.items():
        number, _, rest = name.removeprefix(naming.blocks).partition(".")
        if name in outer:
            restored[outer[name]] = _positions(outer[name], tensor, naming, ours=True)
        elif name.startswith(naming.blocks) and rest in inner:
            ours = inner[rest]
            parts = [f"{naming.blocks}{number}.{one}" for one in naming.inner[ours]]
            absent = [part for part in parts if part not in state]
            if absent:
                raise UsageError(f"{name} is there, and {', '.join(absent)} is missing")
            if name == parts[0]:
                found = [state[part] for part in parts]
                restored[f"{BLOCKS['original']}{number}.{ours}"] = (
                    tensor if len(found) == 1 else torch.cat(found)
                )
        else:
            raise UsageError(f"{name} is not a tensor of AIMv2 in {naming.key} naming")
    return restored


def rename_lit(state: Mapping[str, Tensor], key: str) -> State:
    """Those of a LiT model, which bear our names, under those of the naming `key`."""
    renamed: State = {}
    for ours, (theirs, naming) in LIT_NAMINGS[key].items():
        part = rename(_part(state, ours, [*LIT_NAMINGS[key]]), naming)
        renamed |= {theirs + name: tensor for name, tensor in part.items()}
    return renamed


def restore_lit(state: Mapping[str, Tensor], key: str) -> State:
    """Those of a LiT model, which bear the names of the naming `key`, under ours."""
    restored: State = {}
    prefixes = [theirs for theirs, _ in LIT_NAMINGS[key].values()]
    for ours, (theirs, naming) in LIT_NAMINGS[key].items():
        try:
            part = restore(_part(state, theirs, prefixes), naming)
        except UsageError as error:
            raise UsageError(f"{theirs}{error}") from None
        restored |= {ours + name: tensor for name, tensor in part.items()}
    return restored


def naming_of(names: Iterable[str]) -> tuple[str, str]:
    """Which naming the tensors of an encoder bear, and the prefix before it: that of the vision
    part in a LiT checkpoint, or nothing.

    Told by the first block, which every encoder has. Raises UsageError where there is none.
    """
    names = list(names)
    for key, blocks in BLOCKS.items():
        for prefix in ("", IMAGE.get(key, "")):
            if any(name.startswith(f"{prefix}{blocks}0.") for name in names):
                return key, prefix
    known = ", ".join(f"{blocks}0 ({key})" for key, blocks in BLOCKS.items())
    shown = f"its tensors are {', '.join(names[:3])} …" if names else "it has no tensors"
    raise UsageError(f"no AIMv2 encoder: {shown}, and none is under {known}")


def _part(state: Mapping[str, Tensor], prefix: str, prefixes: list[str]) -> State:
    """The tensors under `prefix`, without it; for "" those under none of `prefixes`."""
    others = tuple(other for other in prefixes if other and other != prefix)
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and not (others and name.startswith(others))
    }


def _positions(ours_name: str, tensor: Tensor, naming: Naming, ours: bool) -> Tensor:
    """The tensor as it is, but the position table with or without its first axis."""
    if ours_name != POSITIONS or naming.key != "transformers":
        return tensor
    return tensor.unsqueeze(0) if ours else tensor.squeeze(0)
