"""Reading and writing AIMv2 encoders, strictly: folders and hub repositories in three layouts.

The names of the tensors tell their naming, and `config.json` the numbers; nothing is guessed from
a path, and no remote code is run. A tensor that is missing, left over or of another shape is an
error that names it.
"""

import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError, nearest
from ..folders import CONFIG_FILE
from .encoder import AIMv2Encoder, EncoderConfig
from .hub import locate
from .layouts import LAYOUTS, load_config
from .namings import (
    HEAD,
    IMAGE,
    NAMINGS,
    POSITIONS,
    State,
    naming_of,
    rename,
    restore,
    restore_lit,
)
from .shapes import shapes_only
from .shards import demand_fit, read_tensors, write_json, write_tensors


def load_encoder(
    source: str | Path, *, image_size: int | None = None, revision: str | None = None
) -> AIMv2Encoder:
    """The encoder of `source`, on the CPU and in the files' own dtype.

    `source` is a folder or a hub id, `org/name` or `org/name@revision`; of a LiT checkpoint the
    encoder alone. With `image_size`, in pixels, learned positions are resized to that size (see
    `resize_positions`). Warns of what is left aside or resized. Raises UsageError, with what to
    do, on anything but a whole AIMv2 encoder: see the module's docstring.
    """
    encoder, notes = read_encoder(locate(source, revision), image_size)
    for note in notes:
        warnings.warn(f"{source}: {note}", stacklevel=2)
    return encoder


def read_encoder(folder: Path, image_size: int | None = None) -> tuple[AIMv2Encoder, list[str]]:
    """The encoder in `folder` as `load_encoder` returns it, with what a user should know of it."""
    config = load_config(folder)
    if shapes_only():
        side = None if config.native else image_size
        return AIMv2Encoder(resized_config(config, side, folder) if side else config), []
    with torch.device("meta"):
        encoder = AIMv2Encoder(config)
    tensors = read_tensors(folder)
    try:
        key, prefix = naming_of(tensors)
        state, aside = _encoder_part(tensors, key, prefix)
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from None
    where = f"{folder}, under {prefix}" if prefix else folder
    demand_fit(state, rename(encoder.state_dict(), NAMINGS[key]), where)
    state = restore(state, NAMINGS[key])
    notes = [f"its encoder alone is read; left aside: {_summary(aside)}"] if aside else []
    if image_size is not None and image_size != config.image_size:
        config = resized_config(config, image_size, folder)
        side = image_size // config.patch_size
        state[POSITIONS] = resize_positions(state[POSITIONS], side)
        notes.append(f"its learned positions are resized to {image_size} px ({side} x {side})")
        with torch.device("meta"):
            encoder = AIMv2Encoder(config)
    encoder.load_state_dict(state, strict=True, assign=True)
    return encoder, notes


def save_encoder(encoder: AIMv2Encoder, folder: str | Path, *, layout: str = "original") -> None:
    """Write `encoder` to `folder`, made if need be, with the names and config of `layout`.

    `original` is ours; `transformers` loads as its Aimv2VisionModel; `timm` loads as
    `timm.create_model("local-dir:FOLDER")` in recent timm, and has no native encoders (UsageError).
    An encoder may be saved where it was loaded from.
    """
    if layout not in LAYOUTS:
        raise UsageError(
            f"layout is {layout!r}, and must be one of {', '.join(LAYOUTS)}"
            f"{nearest(layout, LAYOUTS)}"
        )
    config = LAYOUTS[layout](encoder.config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not shapes_only():
        state = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
        write_tensors(rename(state, NAMINGS[layout]), folder)
    write_json(folder / CONFIG_FILE, config)


def resize_positions(table: Tensor, side: int) -> Tensor:
    """The position table (1, N, D) of a square grid for one of `side` x `side` patches, in its own
    dtype.

    Bicubic on the grid in float32, corners not aligned, without antialiasing; the paper leaves the
    way open. The same side changes nothing.
    """
    before = round(table.shape[1] ** 0.5)
    if before == side:
        return table
    grid = table.float().view(1, before, before, -1).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    resized = F.interpolate(
        grid, size=(side, side), mode="bicubic", align_corners=False, antialias=False
    )
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype).contiguous()


def _encoder_part(tensors: State, key: str, prefix: str) -> tuple[State, list[str]]:
    """The encoder's tensors without a LiT checkpoint's prefix, and our names of all others;
    UsageError for one that no LiT checkpoint has."""
    part, rest = State(), State()
    for name, tensor in tensors.items():
        if name.startswith(prefix) and not name.startswith(prefix + HEAD):
            part[name.removeprefix(prefix)] = tensor
        else:
            rest[name] = tensor
    if rest and key not in IMAGE:  # timm, which has no LiT: its head is a classifier's
        raise UsageError(f"{next(iter(rest))} is left over: give an encoder without a classifier")
    if not prefix:
        rest = {IMAGE[key] + name: tensor for name, tensor in rest.items()}
    return part, sorted(restore_lit(rest, key)) if rest else []


def resized_config(config: EncoderConfig, image_size: int, folder: Path) -> EncoderConfig:
    """`config` at another `image_size` in pixels; UsageError, naming `folder`, for one that is
    impossible."""
    if config.native:
        raise UsageError(
            f"{folder}: image_size {image_size} is asked for, and this native encoder computes "
            "its positions and takes any size: leave image_size out"
        )
    patch = config.patch_size
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < patch:
        raise UsageError(f"image_size must be a whole number of at least {patch}, not {image_size}")
    if image_size % patch:
        below = image_size // patch * patch
        raise UsageError(
            f"image_size {image_size} is not a multiple of the patch size {patch}: "
            f"give {below} or {below + patch}"
        )
    return replace(config, image_size=image_size)


def _summary(names: list[str]) -> str:
    """The parts of the tensors `names`, each with how many there are."""
    counts: dict[str, int] = {}
    for name in names:
        part, _, inner = name.partition(".")
        part = f"{part}.{HEAD.rstrip('.')}" if inner.startswith(HEAD) else part
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{part} ({n} tensor{'s' * (n > 1)})" for part, n in counts.items())
