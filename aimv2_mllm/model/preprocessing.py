"""How pixels become an encoder's input, and the `preprocessor_config.json` that says so beside its
weights."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.layouts import load_config

PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
BICUBIC = 3  # Pillow's number of that filter


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become an encoder's input: the side in pixels, and mean and deviation of each
    channel.

    The defaults are ImageNet's, with which AIMv2 was pre-trained (its published processors use
    CLIP's). A picture is scaled until its short side has `shortest_edge` pixels (None: image_size)
    and cropped to the middle, or, with `squash`, scaled to the square whatever its shape;
    `resample` is Pillow's number of the filter. A `native` encoder takes any size; `image_size` is
    then that of squares for whoever needs one.
    """

    image_size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    shortest_edge: int | None = None
    squash: bool = False
    resample: int = BICUBIC
    native: bool = False

    def prepare(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size as pixel_values (B, 3, image_size, image_size) float32."""
        return self.normalise(np.stack([np.asarray(self._fitted(one)) for one in pictures]))

    def _fitted(self, picture: Image.Image) -> Image.Image:
        side, filter_ = self.image_size, Image.Resampling(self.resample)
        picture = picture.convert("RGB")
        if self.squash:
            return picture.resize((side, side), filter_)
        short, edge = min(picture.size), self.shortest_edge or side
        # Rounded down, as transformers' processors do.
        width, height = (edge * length // short for length in picture.size)
        if picture.size != (width, height):
            picture = picture.resize((width, height), filter_)
        left, top = (width - side) // 2, (height - side) // 2
        return picture.crop((left, top, left + side, top + side))

    def normalise(self, pictures: np.ndarray) -> Tensor:
        """Pictures (B, H, W, 3) uint8 as pixel_values (B, 3, H, W) float32."""
        scale = 1 / (255 * np.array(self.std, dtype=np.float32))
        shift = np.array(self.mean, dtype=np.float32) / np.array(self.std, dtype=np.float32)
        values = pictures * scale.astype(np.float32) - shift.astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2)))

    def restore(self, pixel_values: Tensor) -> np.ndarray:
        """What `normalise` made, as pictures (B, H, W, 3) uint8 again; values outside 0..255 are
        cut."""
        values = pixel_values.float().numpy().transpose(0, 2, 3, 1)
        pictures = (values * np.array(self.std) + np.array(self.mean)) * 255
        return np.asarray((pictures + 0.5).clip(0, 255).astype(np.uint8))

    def save(self, folder: Path) -> None:
        """Write `preprocessor_config.json` as transformers' CLIP processor reads it.

        A native encoder's says, as the released one, nothing of sizes: whoever prepares pictures
        rounds them to whole patches.
        """
        settings = self.settings()
        if self.native:
            settings |= {"do_resize": False, "size": None, "do_center_crop": False}
            settings |= {"crop_size": None}
        text = json.dumps({"image_processor_type": "CLIPImageProcessor", **settings}, indent=2)
        (folder / PREPROCESSOR_FILE).write_text(text + "\n")

    def settings(self) -> dict[str, Any]:
        """The settings of transformers' CLIP processor that do the same."""
        side = self.image_size
        square = {"height": side, "width": side}
        return {
            "do_convert_rgb": True,
            "do_resize": True,
            "size": square if self.squash else {"shortest_edge": self.shortest_edge or side},
            "resample": self.resample,
            "do_center_crop": not self.squash,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    @classmethod
    def load(cls, folder: Path, *, image_size: int | None = None) -> "Preprocessing":
        """What the `preprocessor_config.json` in `folder` says, at another `image_size` if given.

        Those of native encoders have no size: it is then the one that the encoder is meant for.
        UsageError if there is none, or it says too little.
        """
        path = folder / PREPROCESSOR_FILE
        try:
            config = json.loads(path.read_text())
            if image_size is None and _is_native(config):
                image_size = load_config(folder).image_size
            return cls.read(config, image_size=image_size)
        except FileNotFoundError:
            raise UsageError(
                f"{folder}: has no {PREPROCESSOR_FILE}, so nobody knows its image size"
            ) from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(
                f"{path}: is not an image processor's configuration ({error!r})"
            ) from None

    @classmethod
    def read(cls, config: Mapping[str, Any], *, image_size: int | None = None) -> "Preprocessing":
        """What the settings of an image processor of transformers say, at another `image_size` if
        given; KeyError, TypeError or ValueError if they say no size or no mean and deviation."""
        mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
        size, resample = config.get("size"), config.get("resample")
        resample = BICUBIC if resample is None else int(resample)
        if isinstance(size, Mapping) and size.get("height") is not None:
            side = _side(size)
            # Some processors have no crop_size, and some write one that they do not use.
            if config.get("do_center_crop") and _side(config["crop_size"]) != side:
                raise ValueError("it scales to one square and crops another")
            return cls(image_size or side, mean, std, squash=True, resample=resample)
        if image_size is None or config.get("crop_size") is not None:
            crop = _side(config["crop_size"])
        else:  # a processor without a size, of a tower that takes any
            native = _is_native(config)
            squash = size is None and not native
            return cls(image_size, mean, std, squash=squash, resample=resample, native=native)
        edge = size.get("shortest_edge") if isinstance(size, Mapping) else size
        # Another size is looked at without a rim.
        edge = None if edge == crop or image_size not in (None, crop) else edge
        return cls(image_size or crop, mean, std, edge, resample=resample)


def _is_native(config: Mapping[str, Any]) -> bool:
    return config.get("do_resize") is False and not config.get("crop_size")


def _side(size: Any) -> int:
    if isinstance(size, Mapping):
        if size["height"] != size["width"]:
            raise ValueError(f"{size['height']} x {size['width']} pixels are not square")
        return int(size["height"])
    return int(size)
