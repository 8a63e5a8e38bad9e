"""Towers of other families as the source of a host's tower, by transformers' own models.

One level of names is left out: transformers 5 saves CLIP's and SigLIP's without the `vision_model.`
that transformers 4 had, and a tuned tower must be found by both.
"""

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..folders import model_type_of
from ..model.families import (
    TOWERS,
    chosen_norm,
    family_of,
    read_patches,
    side_of,
)
from ..model.foreign import load_foreign
from ..model.hub import locate
from ..model.preprocessing import Preprocessing
from .processor import ImageProcessor


class ForeignSource:
    """A CLIP, SigLIP, DINOv2, ... of transformers; of those with two towers the picture's."""

    native = False

    def __init__(self, location: str, image_size: int | None = None) -> None:
        if image_size is not None:
            raise UsageError(f"hf:{location} takes no ?image_size, which is for aimv2: alone")
        self.location, self.folder = location, locate(location)
        kind = model_type_of(self.folder, "give the folder of a tower")
        self.kind = family_of(kind, str(self.folder))
        if self.kind == "aimv2":
            raise UsageError(f"{location} is AIMv2's: type aimv2:{location}")
        transformers = importlib.import_module("transformers")
        self._class: Any = getattr(transformers, TOWERS[self.kind].model, None)
        if self._class is None:
            raise UsageError(
                f"{location} is a {self.kind}, which transformers {transformers.__version__} does "
                f"not have: pip install --upgrade transformers, or take aimv2:, which needs none"
            )
        self._config = self._class.config_class.from_pretrained(self.folder)
        self._preprocessing = Preprocessing.load(self.folder)
        self.config = SimpleNamespace(
            hidden_size=int(self._config.hidden_size),
            image_size=self._preprocessing.image_size,
            patch_size=side_of(self._config.patch_size),
            num_hidden_layers=int(self._config.num_hidden_layers),
        )

    def allocate(self) -> nn.Module:
        """The network on the default device, with random weights."""
        return _inner(self._class(self._config))

    def build(self) -> nn.Module:
        """The network with random weights, on the CPU."""
        with torch.device("cpu"):
            return self.allocate()

    def read(self) -> nn.Module:
        """The network with its weights, on the CPU; see `load_foreign`."""
        with torch.device("cpu"):
            return _inner(load_foreign(self.kind, self.folder))

    def processor(self) -> ImageProcessor:
        """The folder's image processor."""
        return ImageProcessor(self._preprocessing)

    def features(self, network: nn.Module, pixels: Tensor, *, layer: int, save: bool) -> Tensor:
        """The patch tokens after `layer`, without class and register tokens; whether the last
        layer's go through the last norm is the family's habit."""
        # `save` is not for us: whoever sets it sets it on transformers' layers too.
        depth = self.config.num_hidden_layers
        norm = chosen_norm(None, TOWERS[self.kind].usual_norm, (layer,), depth)
        return read_patches(self.kind, network, pixels, (layer,), norm)

    def packed(self, network: nn.Module, images: list[Tensor]) -> list[Tensor]:
        """Not for towers of one size."""
        raise NotImplementedError


def _inner(model: Any) -> nn.Module:
    network: nn.Module = getattr(model, "vision_model", model)
    return network
