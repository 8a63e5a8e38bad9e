"""Any vision tower behind one interface: pictures in, patch tokens (B, N, D) out, nothing else.

`TOWERS` lists the families, by the `model_type` of config.json. AIMv2 needs torch alone; the others
are transformers' own models, imported when one is loaded.

Letters in shapes: B pictures, N patches, D width.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import UsageError
from ..folders import config_of, pretrained_folder
from .encoder import AIMv2Encoder
from .families import (
    TOWERS,
    chosen_layers,
    chosen_norm,
    family_of,
    grid_of,
    own_size,
    patch_size_of,
    read_patches,
)
from .grids import Grid
from .hub import locate
from .layouts import load_config
from .preprocessing import Preprocessing
from .weights import read_encoder

__all__ = ["TOWERS", "Tower", "load_tower", "open_tower"]


class Tower(nn.Module):
    """A vision tower: `module`, of the family `kind`, whose patch tokens are read from `layers`.

    `norm` says whether they come after its last norm ("post") or before ("pre"). A frozen tower
    gives tokens without gradient, its weights get none, and it stays in evaluation mode.
    """

    def __init__(
        self,
        kind: str,
        module: nn.Module,
        preprocessing: Preprocessing,
        *,
        layers: int | Sequence[int] = -1,
        norm: str | None = None,
        trainable: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.kind, self.module, self.preprocessing, self.notes = kind, module, preprocessing, notes
        config: Any = module.config
        depth = int(config.num_hidden_layers)
        self.layers = chosen_layers(layers, depth)
        self.norm = chosen_norm(norm, TOWERS[kind].usual_norm, self.layers, depth)
        self.trainable = trainable
        self.patch_size = patch_size_of(module)
        self.hidden_size = int(config.hidden_size) * len(self.layers)
        self.train(trainable)

    @property
    def config(self) -> Any:
        """The configuration of the network itself."""
        return self.module.config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def grid(self) -> Grid:
        """Rows and columns of the patches of the pictures that `prepare` makes."""
        side = self.preprocessing.image_size // self.patch_size
        return side, side

    def num_tokens(self, height: int, width: int) -> int:
        """How many tokens come of a picture of `height` x `width` pixels; UsageError for a size
        that is no whole number of patches, or that this tower has no positions for."""
        pixels = torch.empty(1, 3, height, width, device="meta")
        if isinstance(self.module, AIMv2Encoder):
            self.module.check(pixels)
        rows, columns = grid_of(pixels.shape, self.config)
        return rows * columns

    def prepare(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size as pixel_values (B, 3, H, W) float32, as the tower's own image
        processor makes them."""
        return self.preprocessing.prepare(pictures)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The tokens (B, N, D) of all patches in raster order, in the tower's dtype."""
        pixel_values = pixel_values.to(self.device, self.dtype)
        grid_of(pixel_values.shape, self.config)
        with nullcontext() if self.trainable else torch.no_grad():
            return read_patches(self.kind, self.module, pixel_values, self.layers, self.norm)

    def train(self, mode: bool = True) -> Self:
        """Only a trainable tower leaves evaluation mode."""
        return super().train(mode and self.trainable)


def load_tower(
    source: str | Path,
    *,
    layers: int | Sequence[int] = -1,
    norm: str | None = None,
    trainable: bool = False,
    image_size: int | None = None,
) -> Tower:
    """The tower in the folder `source` (a model, of both towers of CLIP and SigLIP the picture's,
    or a run with a pretrain stage), or of a hub id; on the CPU, in the files' own dtype.

    `layers`: numbers of the layers that tokens are read from, side by side: 0 the embeddings, -1
    the last. `norm`: "post" or "pre", whether they go through the tower's last norm; None: for the
    last layer alone as the family is usually read, for others "pre". With `image_size` it looks at
    pictures of that side in pixels, to which learned positions are resized; by default, of the
    side that its preprocessor_config.json says. Raises UsageError on what is no whole tower of a
    family in `TOWERS`.
    """
    folder = pretrained_folder(locate(source))
    kind, module, preprocessing, notes = open_tower(folder, image_size)
    module.requires_grad_(trainable)
    return Tower(
        kind,
        module,
        preprocessing,
        layers=layers,
        norm=norm,
        trainable=trainable,
        notes=notes,
    )


def open_tower(
    folder: Path, image_size: int | None
) -> tuple[str, nn.Module, Preprocessing, list[str]]:
    """The family, the network, the preprocessing and what to know of the tower in `folder`."""
    raw = config_of(folder, "give the folder of a tower")
    # timm's layout, which has no model_type, is AIMv2's or refused there.
    kind = "aimv2" if "architecture" in raw and "model_type" not in raw else None
    kind = kind or family_of(raw.get("model_type"), str(folder))
    if kind != "aimv2":
        from .foreign import load_foreign

        module: nn.Module = load_foreign(kind, folder)
        preprocessing = _preprocessing(kind, module, folder, image_size)
        return kind, module, preprocessing, []
    native = load_config(folder).native
    # A native encoder takes any size as it is.
    encoder, notes = read_encoder(folder, None if native else image_size)
    preprocessing = _preprocessing(kind, encoder, folder, image_size)
    config, side = encoder.config, preprocessing.image_size
    if side % config.patch_size or not (config.native or side == config.image_size):
        raise UsageError(
            f"{folder}: cannot look at pictures of {side} pixels: its encoder is for "
            f"{config.image_size}, in patches of {config.patch_size}"
        )
    return kind, encoder, preprocessing, notes


def _preprocessing(
    kind: str, module: nn.Module, folder: Path, image_size: int | None
) -> Preprocessing:
    """What the folder says of its pictures; the processors of towers that take any size say none,
    and then it is the size that the tower was made for."""
    config: Any = module.config
    if kind == "aimv2" and config.native:
        image_size = image_size or config.image_size
    if kind == "siglip2":
        image_size = image_size or math.isqrt(config.num_patches) * patch_size_of(module)
    preprocessing = Preprocessing.load(folder, image_size=image_size)
    side, patch = preprocessing.image_size, patch_size_of(module)
    if kind != "aimv2" and side != own_size(config) and (side < patch or side % patch):
        raise UsageError(f"{folder}: cannot look at {side} pixels, only multiples of {patch}")
    return preprocessing
