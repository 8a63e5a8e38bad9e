"""The image processor that hosts ask a tower for: pictures of Pillow in, pixel values out.

It computes what transformers' CLIPImageProcessor computes with Pillow. Our own, because that class
says `size` in another type in each release and, beside torchvision, gives other pixels.
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UsageError
from ..model.preprocessing import Preprocessing

MIN_PATCHES, MAX_PATCHES = 112, 4096  # what the released native encoder takes (its model card)


class ImageProcessor:
    """Pictures to pixel values, under the names that hosts read; `size` and `crop_size` are plain
    dicts.

    Without `patch_size` they become the squares of `preprocessing`. With it they keep their shape,
    in a size of 112 to 4096 patches whose rows and columns are multiples of `multiple`.
    """

    def __init__(self, preprocessing: Preprocessing, patch_size: int | None = None) -> None:
        self.preprocessing, self.patch_size, self.multiple = preprocessing, patch_size, 1
        side = preprocessing.image_size
        self.image_mean, self.image_std = list(preprocessing.mean), list(preprocessing.std)
        self.size = {"shortest_edge": preprocessing.shortest_edge or side}
        self.crop_size = {"height": side, "width": side}

    def __call__(self, images: Any, return_tensors: str | None = "pt") -> dict[str, Any]:
        """See `preprocess`."""
        return self.preprocess(images, return_tensors)

    def preprocess(self, images: Any, return_tensors: str | None = "pt") -> dict[str, Any]:
        """`pixel_values` of one picture or several: (B, 3, H, W), or a list of (3, H, W) where
        they differ in size."""
        if return_tensors not in ("pt", None):
            raise UsageError(f"return_tensors is {return_tensors!r}, and must be 'pt'")
        pictures = images if isinstance(images, list | tuple) else [images]
        values = [self._values(picture) for picture in pictures]
        alike = all(value.shape == values[0].shape for value in values)
        return {"pixel_values": torch.stack(values) if alike else values}

    def _values(self, picture: Image.Image) -> Tensor:
        if self.patch_size is None:
            return self.preprocessing.prepare([picture])[0]
        whole = self._whole(picture.convert("RGB"))
        return self.preprocessing.normalise(np.asarray(whole)[None])[0]

    def _whole(self, picture: Image.Image) -> Image.Image:
        """All of `picture`, in the nearest size whose patches can be served."""
        assert self.patch_size is not None
        filter_ = Image.Resampling(self.preprocessing.resample)
        unit = self.patch_size * self.multiple
        least = math.ceil(MIN_PATCHES / self.multiple**2)
        most = MAX_PATCHES // self.multiple**2
        area = picture.width * picture.height / unit**2
        scale = math.sqrt(min(max(area, least), most) / area) / unit
        columns, rows = (max(1, round(side * scale)) for side in picture.size)
        # Rounding, or a long strip, may leave the range: the longer side gives or takes.
        short, long = sorted((rows, columns))
        long = min(max(long, math.ceil(least / short)), most // short)
        rows, columns = (long, short) if rows > columns else (short, long)
        return picture.resize((columns * unit, rows * unit), filter_)
