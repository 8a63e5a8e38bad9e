"""Any tower as probes see it: patch tokens alone, against each model's own words."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation.vision import FOREIGN, load_tower, weights_sha256
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.weights import save_encoder

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 50}  # fmt: skip
SQUARE = {"height": 28, "width": 28}
CLIP = {"size": {"shortest_edge": 28}, "crop_size": SQUARE}
# model_type -> a tiny model of it, its processor, and what of its hidden states is no patch
MAKE = {
    "clip": (lambda: transformers.CLIPModel(_both("CLIP")), "CLIPImageProcessorPil", CLIP, 1),
    "clip_vision_model": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES)),
        "CLIPImageProcessorPil", CLIP, 1,
    ),
    "dinov2": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)),
        "BitImageProcessorPil", CLIP, 1,
    ),
    "dinov2_with_registers": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3)
        ),
        "BitImageProcessorPil", CLIP, 4,
    ),
    "siglip": (
        lambda: transformers.SiglipModel(_both("Siglip")),
        "SiglipImageProcessorPil", {"size": SQUARE}, 0,
    ),
    "siglip_vision_model": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES)),
        "SiglipImageProcessorPil", {"size": SQUARE}, 0,
    ),
}  # fmt: skip


def _both(family: str):
    config = getattr(transformers, f"{family}Config")
    return config(vision_config=SIZES, text_config=TEXT)


def picture(width: int = 50, height: int = 40) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(kind: str, folder: Path):
    make, processor, words, _ = MAKE[kind]
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(folder)
    getattr(transformers, processor)(**words).save_pretrained(folder)
    return model


def test_every_known_tower_is_tried_here() -> None:
    assert FOREIGN.keys() == MAKE.keys()


@pytest.mark.parametrize("kind", MAKE)
@torch.no_grad()
def test_the_tokens_are_the_models_own_less_what_is_no_patch(kind: str, tmp_path: Path) -> None:
    model, others = saved(kind, tmp_path), MAKE[kind][3]
    tower = load_tower(str(tmp_path))
    pixels = tower.prepare([picture(), picture(28, 28)])
    assert pixels.shape == (2, 3, 28, 28)
    vision = getattr(model, "vision_model", model)
    hidden = vision(pixel_values=pixels).last_hidden_state
    assert hidden.shape[1] == 16 + others
    torch.testing.assert_close(tower(pixels), hidden[:, others:])
    assert tower.preprocessing.restore(pixels).shape == (2, 28, 28, 3)


@pytest.mark.parametrize("kind", ["clip_vision_model", "dinov2", "siglip_vision_model"])
def test_a_foreign_tower_can_look_at_another_size(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    tower = load_tower(str(tmp_path), 42)
    assert tower(tower.prepare([picture()])).shape == (1, 36, 16)
    with pytest.raises(UsageError, match="cannot look at 30 pixels, only multiples of 7"):
        load_tower(str(tmp_path), 30)


def test_a_folder_whose_weights_do_not_fit_is_refused(tmp_path: Path) -> None:
    saved("dinov2", tmp_path)
    text = (tmp_path / "config.json").read_text()
    deeper = text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (tmp_path / "config.json").write_text(deeper)
    with pytest.raises(UsageError, match="is missing"):
        load_tower(str(tmp_path))


def test_an_unknown_tower_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UsageError, match=r"is 'vit'; the known towers are aimv2, .*siglip"):
        load_tower(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        load_tower(str(tmp_path))


def ours(folder: Path, native: bool = False) -> AIMv2Encoder:
    torch.manual_seed(0)
    encoder = AIMv2Encoder(EncoderConfig(16, 24, 2, 2, image_size=28, native=native))
    save_encoder(encoder, folder)
    Preprocessing(28).save(folder)
    return encoder.eval()


@torch.no_grad()
def test_our_own_encoder_is_a_tower(tmp_path: Path) -> None:
    encoder = ours(tmp_path)
    tower = load_tower(str(tmp_path))
    middle = picture(60, 28).crop((16, 0, 44, 28))
    pixels = tower.prepare([picture(60, 28)])
    expected = Preprocessing(28).normalise(np.asarray(middle)[None])
    assert torch.equal(pixels, expected)
    torch.testing.assert_close(tower(pixels), encoder(pixels))


@pytest.mark.parametrize("native", [False, True])
def test_our_own_encoder_can_look_at_another_size(native: bool, tmp_path: Path) -> None:
    ours(tmp_path, native)
    tower = load_tower(str(tmp_path), 42)
    assert tower(tower.prepare([picture()])).shape == (1, 9, 16)
    assert [note for note in tower.notes if "resized to 42 px" in note] == list(tower.notes)
    assert bool(tower.notes) != native
    with pytest.raises(UsageError, match="40"):
        load_tower(str(tmp_path), 40)


def test_the_hash_is_of_the_weights_and_nothing_else(tmp_path: Path) -> None:
    encoder = ours(tmp_path)
    digest = weights_sha256(encoder)
    assert digest == weights_sha256(load_tower(str(tmp_path)).module)
    with torch.no_grad():
        encoder.trunk.post_trunk_norm.weight[3] += 1e-6
    assert digest != weights_sha256(encoder)
    other = torch.nn.Linear(2, 2)
    same = torch.nn.ModuleDict({"x": other})
    assert weights_sha256(other) != weights_sha256(same)
