"""Where a tower's weights come from: the text that users give a host as the name of its tower.

`aimv2:FOLDER_OR_HUB_ID`, with `?image_size=448` behind it for learned positions resized to that
many pixels; `hf:FOLDER_OR_HUB_ID` for the other families of `model.families.TOWERS`. Hosts keep
this text in their own config, so it must say everything.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from ..errors import UsageError, nearest
from .foreign import ForeignSource
from .own import AIMv2Source
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


class TowerSource(Protocol):
    """A network that can be made without weights, and read with them."""

    native: bool  # takes images of any size

    @property
    def config(self) -> TowerConfig:
        """The numbers of the network."""

    def allocate(self) -> nn.Module:
        """The network on the default device, its weights not set."""

    def build(self) -> nn.Module:
        """The network on the CPU, its weights not set, and its buffers as they must be."""

    def read(self) -> nn.Module:
        """The network with its weights, on the CPU; UsageError for anything but all of them."""

    def processor(self) -> ImageProcessor:
        """The image processor that goes with it."""

    def features(self, network: nn.Module, pixels: Tensor, *, layer: int, save: bool) -> Tensor:
        """Patch tokens (B, N, D) of `pixels` (B, 3, H, W) after `layer`; `save` trades time for
        memory in training."""

    def packed(self, network: nn.Module, images: list[Tensor]) -> list[Tensor]:
        """Patch tokens (N, D) of each image (3, H, W), after the last layer; sizes may differ."""


# What stands before the colon of a tower's name.
SOURCES: dict[str, Callable[[str, int | None], TowerSource]] = {
    "aimv2": AIMv2Source,
    "hf": ForeignSource,
}
_NAME = re.compile(r"(?P<kind>[a-z0-9_]+):(?P<location>[^?]+)(\?image_size=(?P<size>\d+))?")


def is_source(name: object) -> bool:
    """Whether the name of a tower is meant for us: a word of SOURCES and a colon."""
    return isinstance(name, str) and name.partition(":")[0] in SOURCES and ":" in name


def open_source(name: str) -> TowerSource:
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
