"""Any vision tower as probes see it: pictures in, patch tokens out.

Owns how many tokens of a foreign tower are no patches. Refuses a `model_type` that nobody has
looked at: what stands before the patches is never guessed.

Letters in shapes: B pictures, N patches, D width.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from aimv2_mllm.errors import UsageError
from aimv2_mllm.folders import CONFIG_FILE, pretrained_folder
from aimv2_mllm.model import mllm
from aimv2_mllm.model.encoder import AIMv2Encoder
from aimv2_mllm.model.hub import locate
from aimv2_mllm.model.layouts import MODEL_TYPES, encoder_config, read_config
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.weights import read_encoder


class Tower(Protocol):
    """What a probe needs of a vision tower, frozen and ready for inference."""

    kind: str  # the model_type of its config.json
    preprocessing: Preprocessing  # the side of what it looks at, and how its pixels are normalised
    notes: Sequence[str]  # what to know of how it was loaded, such as resized positions

    @property
    def module(self) -> nn.Module:
        """Its weights."""

    def prepare(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures of any size as pixel_values (B, 3, image_size, image_size)."""

    def __call__(self, pixel_values: Tensor) -> Tensor:
        """The tokens (B, N, D) of all patches in raster order, and of nothing else."""


def fit(pictures: Sequence[Image.Image], preprocessing: Preprocessing) -> Tensor:
    """Pictures of any size, cropped to the middle square, as pixel_values (B, 3, side, side)."""
    side = (preprocessing.image_size, preprocessing.image_size)
    fitted = [ImageOps.fit(one, side, Image.Resampling.BICUBIC) for one in pictures]
    return preprocessing.normalise(np.stack([np.asarray(one) for one in fitted]))


class AIMv2Tower:
    """Our own encoder, which has no token but its patches; pictures are cropped to the middle."""

    kind = "aimv2"

    def __init__(
        self, encoder: AIMv2Encoder, preprocessing: Preprocessing, notes: Sequence[str] = ()
    ) -> None:
        self.module, self.preprocessing, self.notes = encoder.eval(), preprocessing, notes

    def prepare(self, pictures: Sequence[Image.Image]) -> Tensor:
        return fit(pictures, self.preprocessing)

    @torch.inference_mode()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        tokens: Tensor = self.module(pixel_values.to(next(self.module.parameters()).dtype))
        return tokens.float()


class Foreign(NamedTuple):
    """A tower of transformers: its class, how many tokens stand before its patches, what else a
    checkpoint of that model_type holds, and whether it must be told to take another size."""

    model: str
    num_others: Callable[[Any], int]  # of its config: the class token and registers
    other_parts: tuple[str, ...] = ()
    must_be_told: bool = True


# model_type of config.json -> how its patch tokens are had. Features are `last_hidden_state`: after
# the final norm in SigLIP and DINOv2, before it in CLIP (which norms its class token alone).
FOREIGN: dict[str, Foreign] = {
    "clip": Foreign(
        "CLIPVisionModel",
        lambda _: 1,
        ("text_model.", "text_projection.", "visual_projection.", "logit_scale"),
    ),
    "clip_vision_model": Foreign("CLIPVisionModel", lambda _: 1),
    "dinov2": Foreign("Dinov2Model", lambda _: 1, must_be_told=False),
    "dinov2_with_registers": Foreign(
        "Dinov2WithRegistersModel", lambda c: 1 + int(c.num_register_tokens), must_be_told=False
    ),
    "siglip": Foreign(
        "SiglipVisionModel", lambda _: 0, ("text_model.", "logit_scale", "logit_bias")
    ),
    "siglip_vision_model": Foreign("SiglipVisionModel", lambda _: 0),
}


class ForeignTower:
    """A tower of `FOREIGN` with its own image processor."""

    notes: Sequence[str] = ()

    def __init__(self, kind: str, module: Any, processor: Any, image_size: int) -> None:
        self.kind, self.module, self.processor = kind, module, processor
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        self.preprocessing = Preprocessing(image_size, mean, std)

    def prepare(self, pictures: Sequence[Image.Image]) -> Tensor:
        pixels: Tensor = self.processor(list(pictures), return_tensors="pt")["pixel_values"]
        return pixels

    @torch.inference_mode()
    def __call__(self, pixel_values: Tensor) -> Tensor:
        foreign = FOREIGN[self.kind]
        told = {"interpolate_pos_encoding": True} if foreign.must_be_told else {}
        hidden = self.module(pixel_values.to(self.module.dtype), **told).last_hidden_state
        tokens: Tensor = hidden[:, foreign.num_others(self.module.config) :]
        patch = self.module.config.patch_size
        grid = (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch)
        assert tokens.shape[1] == grid, (self.kind, tuple(hidden.shape), grid)
        return tokens.float()


def load_tower(source: str, image_size: int | None = None) -> Tower:
    """The tower in the folder `source` (a model, or a run with a pretrain stage), or of a hub id.

    With `image_size` it looks at pictures of that side in pixels, to which learned positions are
    resized; by default, of the side that its preprocessor_config.json says. Raises UsageError on
    what is no tower that we know.
    """
    folder = pretrained_folder(locate(source))
    kind = _model_type(folder)
    if kind in FOREIGN:
        return _load_foreign(kind, folder, image_size)
    if kind not in (*MODEL_TYPES, None):  # None: timm's layout
        known = ", ".join([*MODEL_TYPES, *FOREIGN])
        raise UsageError(f"{folder}: its model_type is {kind!r}; the known towers are {known}")
    config = encoder_config(read_config(folder), folder / CONFIG_FILE)
    # A native encoder takes any size as it is.
    encoder, notes = read_encoder(folder, None if config.native else image_size)
    preprocessing = Preprocessing.load(folder)
    config, side = encoder.config, image_size or preprocessing.image_size
    if side % config.patch_size or not (config.native or side == config.image_size):
        raise UsageError(
            f"{source}: cannot look at pictures of {side} pixels: its encoder is for "
            f"{config.image_size}, in patches of {config.patch_size}"
        )
    return AIMv2Tower(encoder, replace(preprocessing, image_size=side), notes)


def weights_sha256(module: nn.Module) -> str:
    """The hash of all parameters and buffers by name: equal for equal weights, however stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _model_type(folder: Path) -> str | None:
    """What config.json calls the model; None where it does not, or is not there."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: is not JSON ({error}): download it again") from None
    return config.get("model_type") if isinstance(config, Mapping) else None


def _load_foreign(kind: str, folder: Path, image_size: int | None) -> ForeignTower:
    import transformers
    from safetensors import SafetensorError

    foreign = FOREIGN[kind]
    try:
        module, report = getattr(transformers, foreign.model).from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            use_safetensors=True,
        )
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, SafetensorError) as error:
        line = str(error).strip().splitlines()[0]
        raise UsageError(f"{folder}: no {kind} can be loaded from there ({line})") from None
    left_over = [n for n in report["unexpected_keys"] if not n.startswith(foreign.other_parts)]
    mllm.demand_whole({**report, "unexpected_keys": left_over}, str(folder))
    side = _look_at(processor, image_size, module.config.patch_size, str(folder))
    return ForeignTower(kind, module.eval(), processor, side)


def _look_at(processor: Any, side: int | None, patch_size: int, where: str) -> int:
    """Make `processor` give pictures of `side` pixels, by default of its own side; that side."""
    cropped = bool(processor.do_center_crop)
    size = dict(processor.crop_size if cropped else processor.size)
    if side is None:
        if size.get("height") is None or size["height"] != size.get("width"):
            raise UsageError(f"{where}: gives pictures of no fixed square size; say --image-size")
        return int(size["height"])
    if side % patch_size:
        raise UsageError(f"{where}: cannot look at {side} pixels, only multiples of {patch_size}")
    square = {"height": side, "width": side}
    processor.size = {"shortest_edge": side} if cropped else square
    processor.crop_size = square if cropped else None
    return side
