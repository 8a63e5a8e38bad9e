"""Any tower behind one interface: patch tokens alone, against each model's own words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_towers import FOREIGN, MAKE, picture, saved
from torch import Tensor

import aimv2_mllm
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.shards import weights_sha256
from aimv2_mllm.model.towers import TOWERS, load_tower
from aimv2_mllm.model.weights import save_encoder


def directly(kind: str, vision: Any, pixels: Tensor) -> Any:
    """What the model of transformers says of (B, 3, H, W), all hidden states included."""
    if not kind.startswith("siglip2"):
        told = {"interpolate_pos_encoding": True} if kind.startswith(("clip", "siglip")) else {}
        return vision(pixel_values=pixels, output_hidden_states=True, **told)
    grid = (pixels.shape[2] // 7, pixels.shape[3] // 7)
    flat = torch.nn.functional.unfold(pixels, 7, stride=7).transpose(1, 2)  # (channel, row, column)
    flat = flat.unflatten(2, (3, 49)).transpose(2, 3).flatten(2)
    return vision(
        pixel_values=flat,
        pixel_attention_mask=torch.ones(flat.shape[:2], dtype=torch.long),
        spatial_shapes=torch.tensor([grid] * len(pixels)),
        output_hidden_states=True,
    )


def test_every_known_tower_is_tried_here() -> None:
    types = {name for key in FOREIGN for name in TOWERS[key].model_types}
    assert types == MAKE.keys()


@pytest.mark.parametrize("kind", MAKE)
@torch.no_grad()
def test_the_tokens_are_the_models_own_less_what_is_no_patch(kind: str, tmp_path: Path) -> None:
    vision, others = saved(kind, tmp_path), MAKE[kind][3]
    tower = load_tower(str(tmp_path))
    assert kind in TOWERS[tower.kind].model_types
    pixels = tower.prepare([picture(), picture(28, 28)])
    assert pixels.shape == (2, 3, 28, 28)
    hidden = directly(kind, vision, pixels).last_hidden_state
    assert hidden.shape[1] == 16 + others
    torch.testing.assert_close(tower(pixels), hidden[:, others:])
    assert (tower.hidden_size, tower.patch_size, tower.grid) == (16, 7, (4, 4))
    assert tower.num_tokens(28, 28) == 16
    assert tower.norm == ("pre" if tower.kind == "clip" else "post")
    assert tower.preprocessing.restore(pixels).shape == (2, 28, 28, 3)


@pytest.mark.parametrize("kind", MAKE)
@torch.no_grad()
def test_several_layers_lie_side_by_side(kind: str, tmp_path: Path) -> None:
    vision, others = saved(kind, tmp_path), MAKE[kind][3]
    pixels = torch.randn(2, 3, 28, 28)
    hidden = directly(kind, vision, pixels).hidden_states
    norm = vision.get_submodule(TOWERS[load_tower(str(tmp_path)).kind].norm)
    for layers in ((-2, -1), (0, 2, 1)):
        plain = torch.cat([hidden[layer][:, others:] for layer in layers], -1)
        normed = torch.cat([norm(hidden[layer])[:, others:] for layer in layers], -1)
        tower = load_tower(str(tmp_path), layers=layers)
        assert (tower.norm, tower.hidden_size) == ("pre", 16 * len(layers))
        torch.testing.assert_close(tower(pixels), plain)
        after = load_tower(str(tmp_path), layers=layers, norm="post")
        torch.testing.assert_close(after(pixels), normed)
        assert not torch.allclose(plain, normed)


@pytest.mark.parametrize("kind", MAKE)
@torch.no_grad()
def test_a_foreign_tower_looks_at_pictures_that_are_not_square(kind: str, tmp_path: Path) -> None:
    vision, others = saved(kind, tmp_path), MAKE[kind][3]
    tower, pixels = load_tower(str(tmp_path)), torch.randn(2, 3, 21, 42)
    hidden = directly(kind, vision, pixels).last_hidden_state
    assert tower.num_tokens(21, 42) == 18
    torch.testing.assert_close(tower(pixels), hidden[:, others:])
    for refused in (lambda: tower(pixels[..., :20]), lambda: tower.num_tokens(21, 20)):
        with pytest.raises(UsageError, match="21 x 20 pixels do not divide into patches of 7 x 7"):
            refused()


@pytest.mark.parametrize("kind", MAKE)
def test_a_foreign_tower_can_look_at_another_size(kind: str, tmp_path: Path) -> None:
    saved(kind, tmp_path)
    tower = load_tower(str(tmp_path), image_size=42)
    assert tower(tower.prepare([picture()])).shape == (1, 36, 16)
    with pytest.raises(UsageError, match="cannot look at 30 pixels, only multiples of 7"):
        load_tower(str(tmp_path), image_size=30)


@pytest.mark.parametrize("kind", [kind for kind in MAKE if not kind.startswith("siglip2")])
def test_pictures_are_prepared_as_by_the_processor_of_transformers(
    kind: str, tmp_path: Path
) -> None:
    saved(kind, tmp_path)
    pictures = [picture(), picture(28, 28), picture(31, 90)]
    processor = getattr(transformers, MAKE[kind][1]).from_pretrained(tmp_path)
    theirs = processor(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(load_tower(str(tmp_path)).prepare(pictures), theirs)


def test_a_naflex_tower_squashes_what_its_own_processor_would_leave_long(tmp_path: Path) -> None:
    saved("siglip2_vision_model", tmp_path)
    processor = transformers.Siglip2ImageProcessorPil.from_pretrained(tmp_path)
    theirs = processor([picture(50, 50)], return_tensors="pt")
    tower = load_tower(str(tmp_path))
    assert theirs["spatial_shapes"].tolist() == [[4, 4]]
    arguments = TOWERS["siglip2"].arguments(tower.prepare([picture(50, 50)]), tower.config)
    torch.testing.assert_close(arguments["pixel_values"], theirs["pixel_values"])


@torch.no_grad()
def test_a_tower_may_leave_the_rim_of_its_own_size_out_of_sight(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.SiglipVisionConfig(
        **sizes, num_attention_heads=2, image_size=30, patch_size=7
    )
    model = transformers.SiglipVisionModel(config).eval()  # as SigLIP's 384 pixels in patches of 14
    model.save_pretrained(tmp_path)
    size = {"height": 30, "width": 30}
    transformers.SiglipImageProcessorPil(size=size).save_pretrained(tmp_path)
    tower = load_tower(tmp_path)
    pixels = tower.prepare([picture()])
    assert (pixels.shape, tower.grid, tower.num_tokens(30, 30)) == ((1, 3, 30, 30), (4, 4), 16)
    torch.testing.assert_close(tower(pixels), model(pixels).last_hidden_state)
    with pytest.raises(UsageError, match="37 x 37 pixels do not divide"):
        tower.num_tokens(37, 37)


@pytest.mark.parametrize("kind", ["clip", "dinov3_vit"])
def test_a_frozen_tower_gives_no_gradient_and_a_trainable_one_does(
    kind: str, tmp_path: Path
) -> None:
    saved(kind, tmp_path)
    pixels = torch.randn(1, 3, 28, 28)
    frozen = load_tower(str(tmp_path)).train()
    assert not frozen(pixels.clone().requires_grad_()).requires_grad
    assert not frozen.module.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    free = load_tower(str(tmp_path), trainable=True)
    assert free.module.training
    free(pixels).sum().backward()
    name, patches = next((n, p) for n, p in free.named_parameters() if "patch_embedding" in n)
    assert patches.grad is not None, name
    assert patches.grad.any(), name


def test_a_tower_of_lower_precision_gives_its_own_dtype(tmp_path: Path) -> None:
    saved("siglip_vision_model", tmp_path)
    tower = load_tower(str(tmp_path)).to(torch.bfloat16)
    assert tower.dtype is torch.bfloat16
    assert tower.device.type == "cpu"
    assert tower(torch.randn(1, 3, 28, 28)).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"layers": 3}, r"layers is 3, and must be one or several of 0 \(the embeddings\) to 2"),
        ({"layers": []}, "must be one or several"),
        ({"norm": "after"}, "norm is 'after', and must be one of post, pre"),
    ],
)
def test_an_impossible_choice_is_refused(words: dict[str, Any], says: str, tmp_path: Path) -> None:
    saved("clip_vision_model", tmp_path)
    with pytest.raises(UsageError, match=says):
        load_tower(str(tmp_path), **words)


def test_a_family_is_told_by_its_model_type_and_not_by_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "siglip-dinov2-aimv2"
    saved("clip_vision_model", folder)
    assert load_tower(str(folder)).kind == "clip"
    assert aimv2_mllm.load_tower is load_tower
    assert aimv2_mllm.TOWERS is TOWERS


def test_a_processor_that_is_missing_is_said(tmp_path: Path) -> None:
    saved("dinov2", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"has no preprocessor_config.json"):
        load_tower(str(tmp_path))


def test_a_folder_whose_weights_do_not_fit_is_refused(tmp_path: Path) -> None:
    saved("dinov2", tmp_path)
    text = (tmp_path / "config.json").read_text()
    deeper = text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    (tmp_path / "config.json").write_text(deeper)
    with pytest.raises(UsageError, match="is missing"):
        load_tower(str(tmp_path))


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    saved("siglip_vision_model", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(UsageError, match=r"encoder\.layers\.1\.\S+ is left over"):
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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped")
@pytest.mark.parametrize("kind", ["aimv2", "siglip"])
def test_a_loaded_tower_lies_in_its_file_of_which_nothing_was_read(
    kind: str, tmp_path: Path
) -> None:
    # So that a run's checks may load it on every rank before anything is trained.
    ours(tmp_path) if kind == "aimv2" else saved(kind, tmp_path)
    tower = load_tower(tmp_path)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    file = str(tmp_path / "model.safetensors")
    mapped = [[int(end, 16) for end in line[0].split("-")] for line in lines if line[-1] == file]
    for name, parameter in tower.module.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in mapped), name


@pytest.mark.parametrize("native", [False, True])
def test_our_own_encoder_can_look_at_another_size(native: bool, tmp_path: Path) -> None:
    ours(tmp_path, native)
    tower = load_tower(str(tmp_path), image_size=42)
    assert tower(tower.prepare([picture()])).shape == (1, 9, 16)
    assert [note for note in tower.notes if "resized to 42 px" in note] == list(tower.notes)
    assert bool(tower.notes) != native
    with pytest.raises(UsageError, match="40"):
        load_tower(str(tmp_path), image_size=40)


def test_the_hash_is_of_the_weights_and_nothing_else(tmp_path: Path) -> None:
    encoder = ours(tmp_path)
    digest = weights_sha256(encoder.state_dict())
    assert digest == weights_sha256(load_tower(str(tmp_path)).module.state_dict())
    with torch.no_grad():
        encoder.trunk.post_trunk_norm.weight[3] += 1e-6
    assert digest != weights_sha256(encoder.state_dict())
    other = torch.nn.Linear(2, 2)
    same = torch.nn.ModuleDict({"x": other})
    assert weights_sha256(other.state_dict()) != weights_sha256(same.state_dict())


@torch.no_grad()
def test_layers_of_our_own_encoder_equal_those_of_transformers(tmp_path: Path) -> None:
    encoder = ours(tmp_path / "ours")
    encoder.trunk.post_trunk_norm.weight.add_(torch.randn(16))
    save_encoder(encoder, tmp_path / "ours")
    save_encoder(encoder, tmp_path / "theirs", layout="transformers")
    twin = transformers.Aimv2VisionModel.from_pretrained(tmp_path / "theirs")
    twin.config.tie_last_hidden_states = False
    pixels = torch.randn(2, 3, 28, 28)
    hidden = twin(pixels, output_hidden_states=True).hidden_states
    for layers in ((-1, -2), (0, 1)):
        expected = torch.cat([hidden[layer] for layer in layers], -1)
        tower = load_tower(tmp_path / "ours", layers=layers)
        torch.testing.assert_close(tower(pixels), expected)
    post = load_tower(tmp_path / "ours", layers=[-2], norm="post")
    torch.testing.assert_close(post(pixels), twin.rms_norm(hidden[-2]))
    torch.testing.assert_close(load_tower(tmp_path / "ours")(pixels), encoder(pixels))


def test_a_native_encoder_takes_any_grid_and_a_fixed_one_says_what_it_takes(tmp_path: Path) -> None:
    native = load_tower(ours(tmp_path / "native", native=True) and tmp_path / "native")
    assert native.num_tokens(28, 42) == 6
    assert native(torch.randn(1, 3, 28, 42)).shape == (1, 6, 16)
    ours(tmp_path / "fixed")
    with pytest.raises(ValueError, match="learned positions for 28 x 28 pixels"):
        load_tower(tmp_path / "fixed").num_tokens(28, 42)


def test_a_native_encoder_whose_processor_says_no_size_has_its_own(tmp_path: Path) -> None:
    ours(tmp_path, native=True)
    path = tmp_path / "preprocessor_config.json"
    config = json.loads(path.read_text())
    none = {"do_resize": False, "size": None, "do_center_crop": False, "crop_size": None}
    path.write_text(json.dumps({**config, **none}))
    # The original layout has the number of patches in place of a size.
    assert load_tower(tmp_path).preprocessing.image_size == 28
