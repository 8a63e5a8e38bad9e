"""A tiny random tower of every family, written as its own library writes it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from aimv2_mllm.model.towers import TOWERS

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "patch_size": 7,
}  # fmt: skip
SIZED = {**SIZES, "image_size": 28}
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 50}  # fmt: skip
SQUARE = {"height": 28, "width": 28}
CLIP = {"size": {"shortest_edge": 28}, "crop_size": SQUARE}
T = transformers
# model_type -> a tiny model of it, its processor, and what of its hidden states is no patch
MAKE: dict[str, Any] = {
    "clip": (
        lambda: T.CLIPModel(T.CLIPConfig(vision_config=SIZED, text_config=TEXT)),
        "CLIPImageProcessorPil", CLIP, 1,
    ),
    "clip_vision_model": (
        lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**SIZED)), "CLIPImageProcessorPil", CLIP, 1,
    ),
    "dinov2": (
        lambda: T.Dinov2Model(T.Dinov2Config(**SIZED)),
        "BitImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": SQUARE}, 1,
    ),
    "dinov2_with_registers": (
        lambda: T.Dinov2WithRegistersModel(
            T.Dinov2WithRegistersConfig(**SIZED, num_register_tokens=3)
        ),
        "BitImageProcessorPil", CLIP, 4,
    ),
    # Its own processor needs torchvision; this one does the same but for rounding.
    "dinov3_vit": (
        lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**SIZED, num_register_tokens=2)),
        "SiglipImageProcessorPil", {"size": SQUARE, "resample": 2}, 3,
    ),
    "siglip": (
        lambda: T.SiglipModel(T.SiglipConfig(vision_config=SIZED, text_config=TEXT)),
        "SiglipImageProcessorPil", {"size": SQUARE}, 0,
    ),
    "siglip_vision_model": (
        lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**SIZED)),
        "SiglipImageProcessorPil", {"size": SQUARE}, 0,
    ),
    "siglip2": (
        lambda: T.Siglip2Model(
            T.Siglip2Config(vision_config={**SIZES, "num_patches": 16}, text_config=TEXT)
        ),
        "Siglip2ImageProcessorPil", {"patch_size": 7, "max_num_patches": 16}, 0,
    ),
    "siglip2_vision_model": (
        lambda: T.Siglip2VisionModel(T.Siglip2VisionConfig(**SIZES, num_patches=16)),
        "Siglip2ImageProcessorPil", {"patch_size": 7, "max_num_patches": 16}, 0,
    ),
}  # fmt: skip
FOREIGN = sorted(set(TOWERS) - {"aimv2"})


def picture(width: int = 50, height: int = 40) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(kind: str, folder: Path) -> Any:
    """A tiny model of that kind, written to `folder` with its processor; its picture tower."""
    make, processor, words, _ = MAKE[kind]
    torch.manual_seed(0)
    model = make().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # all ones or zeros when fresh: a norm left out would not be seen
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    getattr(transformers, processor)(**words).save_pretrained(folder)
    return getattr(model, "vision_model", model)
