"""The image processor that hosts ask a tower for: pictures of Pillow in, pixel values out.

It computes what transformers' CLIPImageProcessor computes with Pillow. Our own, because that class
says `size` in another type in each release and, beside torchvision, gives other pixels.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UsageError
from ..model.preprocessing import BICUBIC, PREPROCESSOR_FILE

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of AIMv2's published processors too
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MIN_PATCHES, MAX_PATCHES = 112, 4096  # what the released native encoder takes (its model card)


@dataclass
class ImageProcessor:
    """Pictures to pixel values, under the names that hosts read.

    `size` and `crop_size` are plain dicts. A fixed processor scales the shorter edge to
    `image_size` and crops the middle; one with `patch_size` keeps the shape, in a size of 112 to
    4096 patches whose rows and columns are multiples of `multiple`.
    """

    image_size: int
    image_mean: Sequence[float] = CLIP_MEAN
    image_std: Sequence[float] = CLIP_STD
    resample: int = BICUBIC
    patch_size: int | None = None
    multiple: int = 1

    def __post_init__(self) -> None:
        self.size = {"shortest_edge": self.image_size}
        self.crop_size = {"height": self.image_size, "width": self.image_size}

    @classmethod
    def load(cls, folder: Path, image_size: int, patch_size: int | None = None) -> "ImageProcessor":
        """The processor for an encoder of `image_size` with the mean, deviation and filter that the
        `preprocessor_config.json` in `folder` says, or CLIP's where there is none."""
        path = folder / PREPROCESSOR_FILE
        if not path.is_file():
            return cls(image_size, patch_size=patch_size)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            mean, std = ([float(x) for x in config[key]] for key in ("image_mean", "image_std"))
            if len(mean) != 3 or len(std) != 3 or not all(std):
                raise ValueError("image_mean and image_std need three numbers")
            return cls(image_size, mean, std, int(config.get("resample", BICUBIC)), patch_size)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{path}: is not an image processor's configuration ({error!r})"
            ) from None

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
        picture = picture.convert("RGB")
        picture = self._crop(picture) if self.patch_size is None else self._whole(picture)
        pixels = np.asarray(picture, dtype=np.float32) / np.float32(255)
        mean, std = (np.array(v, dtype=np.float32) for v in (self.image_mean, self.image_std))
        return torch.from_numpy(np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1)))

    def _crop(self, picture: Image.Image) -> Image.Image:
        """The middle square of `picture`, its shorter edge scaled to `image_size`."""
        side, short = self.image_size, min(picture.size)
        # The longer edge is cut to a whole number, as transformers does it.
        width, height = (side if n == short else int(side * n / short) for n in picture.size)
        picture = picture.resize((width, height), Image.Resampling(self.resample))
        left, top = (width - side) // 2, (height - side) // 2
        return picture.crop((left, top, left + side, top + side))

    def _whole(self, picture: Image.Image) -> Image.Image:
        """All of `picture`, in the nearest size whose patches can be served."""
        assert self.patch_size is not None
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
        return picture.resize((columns * unit, rows * unit), Image.Resampling(self.resample))
