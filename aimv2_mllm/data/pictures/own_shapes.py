"""Pictures in their own shape, for towers that take any size: the patches that one gets, the tokens
that these become, and its pixels.

They are those that the image processor of such a model gives (`model.llava`).
"""

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from aimv2_mllm.data.pictures.decode import decode, whole
from aimv2_mllm.data.pictures.images import opened, orientation
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.connectors import Connector, build_connector
from aimv2_mllm.model.grids import Grid, fitting_grid


def demand_native(is_native: bool, side: int) -> None:
    """UsageError for pictures that shall keep their shape before a tower that takes squares of
    `side` pixels alone."""
    if not is_native:
        raise UsageError(
            "data.image_aspect: native is for towers of native resolution, and this one takes"
            f" squares of {side} px: say pad or crop"
        )


@dataclass(frozen=True)
class OwnShapes:
    """How pictures are scaled for a tower of `patch_size` pixels and a connector: to at most `most`
    patches, in rows and columns that are multiples of `unit`. It can be sent to another process."""

    patch_size: int
    most: int
    unit: int
    connector: dict[str, Any]  # name, widths and options, as `build_connector` takes them

    @classmethod
    def of(cls, processor: Any) -> "OwnShapes":
        """Those of a Llava's `processor`; UsageError where its tower takes squares alone."""
        pictures = processor.image_processor
        side = pictures.crop_size["height"]
        demand_native("image_sizes" in pictures.model_input_names, side)
        most = (side // pictures.patch_size) ** 2
        return cls(pictures.patch_size, most, pictures.unit, processor.connector)

    def num_tokens(self, content: bytes) -> int:
        """How many tokens an encoded picture becomes; of it the header alone is read. `Unusable`
        where it is none."""
        with opened(io.BytesIO(content)) as picture:
            width, height = picture.size
            if orientation(picture) in (5, 6, 7, 8):  # lies on its side
                width, height = height, width
        return self._counter.num_tokens(self._grid(height, width))

    def pixels(self, content: bytes) -> np.ndarray:
        """An encoded picture as (H, W, 3) uint8, whole patches; `Unusable` where it is none."""
        return decode(content, self._size, whole)

    def _grid(self, height: int, width: int) -> Grid:
        return fitting_grid(height, width, self.most, unit=self.unit)

    def _size(self, width: int, height: int) -> tuple[int, int]:
        rows, columns = self._grid(height, width)
        return columns * self.patch_size, rows * self.patch_size

    @cached_property
    def _counter(self) -> Connector:
        with torch.device("meta"):
            return build_connector(**self.connector)
