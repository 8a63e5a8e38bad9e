"""How pixels become an encoder's input, and the `preprocessor_config.json` that says so beside its
weights."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.layouts import CONFIG_FILE, encoder_config, read_config

PREPROCESSOR_FILE = "preprocessor_config.json"
BICUBIC = 3  # Pillow's number of that filter


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become an encoder's input: the side in pixels, and mean and deviation of each
    channel.

    The defaults are ImageNet's, with which AIMv2 was pre-trained (its published processors use
    CLIP's). A `native` encoder takes any size; `image_size` is then that of squares for whoever
    needs one.
    """

    image_size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    native: bool = False

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
        size = self.image_size
        config = {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": not self.native,
            "size": None if self.native else {"shortest_edge": size},
            "resample": BICUBIC,
            "do_center_crop": not self.native,
            "crop_size": None if self.native else {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        (folder / PREPROCESSOR_FILE).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, *, image_size: int | None = None) -> "Preprocessing":
        """What the `preprocessor_config.json` in `folder` says, at another `image_size` if given.

        Those of native encoders have no size: it is then the one that the encoder is meant for.
        UsageError if there is none, or it says too little.
        """
        path = folder / PREPROCESSOR_FILE
        try:
            config = json.loads(path.read_text())
            mean, std = config["image_mean"], config["image_std"]
            native = config.get("do_resize") is False and not config.get("crop_size")
            side = image_size or (
                encoder_config(read_config(folder), folder / CONFIG_FILE).image_size
                if native
                else int(config["crop_size"]["height"])
            )
            return cls(side, tuple(mean), tuple(std), native)
        except FileNotFoundError:
            raise UsageError(
                f"{folder}: has no {PREPROCESSOR_FILE}, so nobody knows its image size"
            ) from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(
                f"{path}: is not an image processor's configuration ({error!r})"
            ) from None
