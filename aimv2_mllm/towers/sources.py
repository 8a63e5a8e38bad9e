"""Where a tower's weights come from: the text that users give a host as the name of its tower.

`aimv2:FOLDER_OR_HUB_ID`, and `?image_size=448` behind it for learned positions resized to that many
pixels. Hosts keep this text in their own config, so it must say everything.
"""

import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UsageError, nearest
from ..model.encoder import AIMv2Encoder, EncoderConfig
from ..model.hub import locate
from ..model.layouts import CONFIG_FILE, encoder_config, read_config
from ..model.weights import read_encoder, resized_config
from .processor import ImageProcessor


class TowerConfig(Protocol):
    """What hosts read of a tower's network."""

    @property
    def hidden_size(self) -> int:
        """The width of its tokens."""

    @property
    def image_size(self) -> int:
        """The side of the images that it is for, pixels."""

    @property
    def patch_size(self) -> int:
        """The side of a patch, pixels."""

    @property
    def num_hidden_layers(self) -> int:
        """How many blocks it has."""


class Source(Protocol):
    """A network that can be made without weights, and read with them."""

    native: bool  # takes images of any size

    @property
    def config(self) -> TowerConfig:
        """The numbers of the network."""

    def allocate(self) -> nn.Module:
        """The network on the default device, its weights not set."""

    def read(self) -> nn.Module:
        """The network with its weights, on the CPU; UsageError for anything but all of them."""

    def processor(self) -> ImageProcessor:
        """The image processor that goes with it."""

    def features(self, network: nn.Module, pixels: Tensor, *, layer: int, save: bool) -> Tensor:
        """Patch tokens (B, N, D) of `pixels` (B, 3, H, W) after `layer`; `save` trades time for
        memory in training."""

    def packed(self, network: nn.Module, images: list[Tensor]) -> list[Tensor]:
        """Patch tokens (N, D) of each image (3, H, W), after the last layer; sizes may differ."""


class AIMv2Source:
    """An AIMv2 encoder, in any layout that `load_encoder` reads."""

    def __init__(self, location: str, image_size: int | None = None) -> None:
        self.location, self.image_size = location, image_size
        self.folder = locate(location)
        self.config: EncoderConfig = encoder_config(
            read_config(self.folder), self.folder / CONFIG_FILE
        )
        if image_size is not None and image_size != self.config.image_size:
            self.config = resized_config(self.config, image_size, self.folder)
        self.native = self.config.native

    def allocate(self) -> nn.Module:
        """The encoder on the default device, its weights not set."""
        # A host may be building its whole model on the meta device.
        device = torch.empty(0).device
        with torch.device("meta"):  # draws no random weights
            encoder = AIMv2Encoder(self.config)
        return encoder if device.type == "meta" else encoder.to_empty(device=device)

    def read(self) -> nn.Module:
        """The encoder with its weights, on the CPU; see `read_encoder`."""
        with torch.device("cpu"):
            return read_encoder(self.folder, self.image_size)[0]

    def processor(self) -> ImageProcessor:
        """The folder's image processor, at the encoder's own size."""
        patch_size = self.config.patch_size if self.native else None
        return ImageProcessor.load(self.folder, self.config.image_size, patch_size)

    def features(self, network: nn.Module, pixels: Tensor, *, layer: int, save: bool) -> Tensor:
        """The tokens after the final norm for the last layer, and else the residual stream after
        block `layer`; blocks behind it are not run."""
        assert isinstance(network, AIMv2Encoder)
        depth = len(network.trunk.blocks)
        if layer == depth and not save:
            final: Tensor = network(pixels)
            return final
        network.check(pixels)
        tokens: Tensor = network.preprocessor(pixels)
        for block in network.trunk.blocks[:layer]:
            if save and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        return network.trunk.post_trunk_norm(tokens) if layer == depth else tokens

    def packed(self, network: nn.Module, images: list[Tensor]) -> list[Tensor]:
        """See `AIMv2Encoder.encode_images`."""
        assert isinstance(network, AIMv2Encoder)
        return network.encode_images(images)


# What stands before the colon of a tower's name.
SOURCES: dict[str, type[AIMv2Source]] = {"aimv2": AIMv2Source}
_NAME = re.compile(r"(?P<kind>[a-z0-9_]+):(?P<location>[^?]+)(\?image_size=(?P<size>\d+))?")


def is_source(name: object) -> bool:
    """Whether the name of a tower is meant for us: a word of SOURCES and a colon."""
    return isinstance(name, str) and name.partition(":")[0] in SOURCES and ":" in name


def open_source(name: str) -> Source:
    """The source of a tower's name; UsageError for one that is not right, saying what to type."""
    forms = " or ".join(f"{kind}:FOLDER_OR_HUB_ID" for kind in SOURCES)
    match = _NAME.fullmatch(name)
    if match is None:
        raise UsageError(f"vision tower {name!r} is not {forms}, with ?image_size=N or without")
    kind, location, size = match["kind"], match["location"], match["size"]
    if kind not in SOURCES:
        raise UsageError(
            f"vision tower {name!r} begins with {kind!r}, and must be {forms}"
            f"{nearest(kind, SOURCES)}"
        )
    return SOURCES[kind](
        str(Path(location).expanduser()) if location[0] == "~" else location,
        None if size is None else int(size),
    )
