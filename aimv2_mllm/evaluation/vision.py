"""What a probe needs of a vision tower."""

from collections.abc import Sequence
from typing import Protocol

from PIL import Image
from torch import Tensor, nn

from aimv2_mllm.model.preprocessing import Preprocessing


class Seeing(Protocol):
    """What a probe needs of a vision tower, such as `load_tower` returns, frozen."""

    kind: str  # its family
    preprocessing: Preprocessing  # the side of what it looks at, and how its pixels are normalised
    notes: Sequence[str]  # what to know of how it was loaded, such as resized positions

    @property
    def module(self) -> nn.Module:
        """Its weights."""

    def prepare(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size as pixel_values (B, 3, image_size, image_size)."""

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """The tokens (B, N, D) of all patches in raster order, and of nothing else."""
