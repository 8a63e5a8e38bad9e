"""The tower that hosts get, without a host: who fills it, when, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from llava_world import make_foreign, make_tower
from PIL import Image

from aimv2_mllm import load_encoder, load_tower
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.towers.processor import MAX_PATCHES, MIN_PATCHES, ImageProcessor
from aimv2_mllm.towers.sources import SOURCES, is_source, open_source
from aimv2_mllm.towers.tower import CHECKPOINT, WITNESS, VisionTower

IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tower(tmp_path_factory.mktemp("towers") / "fixed")


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tower(tmp_path_factory.mktemp("towers") / "native", native=True)


def loaded(name: str, layer: int = -1) -> VisionTower:
    tower = VisionTower(name, layer=layer)
    tower.load_model()
    return tower


def test_a_loaded_tower_is_the_encoder_frozen_and_in_the_dtype_of_its_images(folder: Path) -> None:
    tower, encoder = loaded(f"aimv2:{folder}"), load_encoder(folder)
    assert torch.equal(tower(IMAGES), encoder(IMAGES))
    assert not tower(IMAGES).requires_grad
    assert not tower.trainable
    assert tower.origin == f"aimv2:{folder}"
    assert tower.to(torch.float16)(IMAGES).dtype == torch.float32
    assert tower(IMAGES.half()).dtype == torch.float16


def test_the_first_call_loads_a_tower_that_nobody_has_loaded(folder: Path) -> None:
    assert torch.equal(VisionTower(f"aimv2:{folder}")(IMAGES), loaded(f"aimv2:{folder}")(IMAGES))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_building_only_allocates_and_a_whole_checkpoint_fills(folder: Path, device: str) -> None:
    saved = loaded(f"aimv2:{folder}")
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter += 1
    with torch.device(device):
        tower = VisionTower(f"aimv2:{folder}")
    assert not tower.is_loaded
    assert {p.device.type for p in tower.parameters()} == {device}
    tower.load_state_dict(saved.state_dict(), assign=device == "meta")
    tower.requires_grad_(True)  # as loaders of transformers 5 leave it
    tower.load_model()
    assert tower.origin == CHECKPOINT
    assert torch.equal(tower(IMAGES), saved(IMAGES))
    assert not tower.trainable


def test_memory_that_nobody_set_is_no_witness(folder: Path) -> None:
    tower = VisionTower(f"aimv2:{folder}")
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.fill_(float("nan"))
    tower.witness = torch.tensor([WITNESS + 1])
    tower.load_model()
    assert tower.origin == f"aimv2:{folder}"
    assert bool(torch.isfinite(tower(IMAGES)).all())


def test_loading_keeps_the_parameters_that_an_optimizer_may_hold(folder: Path) -> None:
    tower = VisionTower(f"aimv2:{folder}")
    before = [id(parameter) for parameter in tower.parameters()]
    tower.load_model()
    assert [id(parameter) for parameter in tower.parameters()] == before


def test_a_part_of_a_tuned_tower_lies_upon_its_source(folder: Path) -> None:
    expected = loaded(f"aimv2:{folder}")
    norm = expected.vision_tower.trunk.post_trunk_norm.weight
    with torch.no_grad():
        norm += 1
    tower = VisionTower(f"aimv2:{folder}")
    part = {"vision_tower.trunk.post_trunk_norm.weight": norm.detach().clone()}
    tower.load_state_dict(part, strict=False)
    assert tower.origin == CHECKPOINT
    assert torch.equal(tower(IMAGES), expected(IMAGES))


def test_a_tower_whose_layers_a_loader_replaced_is_made_whole_from_its_source(
    folder: Path,
) -> None:
    tower = VisionTower(f"aimv2:{folder}")
    for block in tower.vision_tower.trunk.blocks:  # as a loader that quantises does
        block.mlp.fc1.weight = torch.nn.Parameter(
            torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False
        )
    tower.load_model()
    assert torch.equal(tower(IMAGES), load_encoder(folder)(IMAGES))


def test_a_checkpoint_that_is_not_finite_is_refused(folder: Path) -> None:
    state = loaded(f"aimv2:{folder}").state_dict()
    state["vision_tower.trunk.blocks.0.attn.qkv.weight"][0, 0] = float("nan")
    tower = VisionTower(f"aimv2:{folder}")
    tower.load_state_dict(state)
    with pytest.raises(UsageError, match=r"checkpoint has weights that are not finite \(trunk"):
        tower.load_model()


def test_layers_count_as_hidden_states_and_only_the_last_is_normed(folder: Path) -> None:
    encoder = load_encoder(folder)
    states = [encoder.preprocessor(IMAGES)]
    for block in encoder.trunk.blocks:
        states.append(block(states[-1]))
    for layer in (0, 1, 2, -2, -3, -4):
        assert torch.equal(loaded(f"aimv2:{folder}", layer)(IMAGES), states[layer]), layer
    for layer in (-1, 3):
        assert torch.equal(loaded(f"aimv2:{folder}", layer)(IMAGES), encoder(IMAGES)), layer
    for layer in (4, -5):
        with pytest.raises(UsageError, match=f"layer {layer} is asked of .* which has 3"):
            VisionTower(f"aimv2:{folder}", layer=layer)


def test_a_tower_trains_with_and_without_saved_memory_alike(folder: Path) -> None:
    gradients = []
    for save in (False, True):
        tower = loaded(f"aimv2:{folder}")
        tower.vision_tower.requires_grad_(True)
        tower.gradient_checkpointing = save
        tower.train()
        assert tower.training
        tower(IMAGES).square().mean().backward()
        gradients.append([p.grad.clone() for p in tower.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(g.abs().sum() > 0 for g in gradients[0])


def test_a_frozen_tower_stays_in_evaluation_mode(folder: Path) -> None:
    tower = loaded(f"aimv2:{folder}")
    torch.nn.Sequential(tower).train()
    assert not tower.training


def test_native_images_of_different_sizes_give_what_they_give_alone(native: Path) -> None:
    for layer in (-1, -2):
        tower = loaded(f"aimv2:{native}", layer)
        images = [torch.randn(3, 28, 56), torch.randn(1, 3, 84, 42)]
        a, b = tower(images)
        assert (a.shape[:2], b.shape[:2]) == ((1, 8), (1, 18))
        assert torch.allclose(a, tower(images[0][None]), atol=1e-5)
        assert torch.allclose(b, tower(images[1]), atol=1e-5)


def test_an_image_of_another_size_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"learned positions for 56 x 56 pixels.* 28 x 28"):
        loaded(f"aimv2:{folder}")(torch.zeros(1, 3, 28, 28))


def test_positions_are_resized_if_the_name_says_so(folder: Path) -> None:
    tower = loaded(f"aimv2:{folder}?image_size=112")
    with pytest.warns(UserWarning, match="resized to 112"):
        encoder = load_encoder(folder, image_size=112)
    images = torch.randn(1, 3, 112, 112)
    assert torch.equal(tower(images), encoder(images))
    assert tower.image_processor.crop_size == {"height": 112, "width": 112}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_other_families_are_what_load_tower_gives(tmp_path: Path, kind: str) -> None:
    source = make_foreign(tmp_path / kind, kind)
    for layer in (-1, -2):
        tower, expected = loaded(f"hf:{source}", layer), load_tower(source, layers=layer)
        assert torch.equal(tower(IMAGES), expected(IMAGES))
    with torch.device("meta"):
        empty = VisionTower(f"hf:{source}")
    assert torch.equal(empty(IMAGES), loaded(f"hf:{source}")(IMAGES))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aimv2:", "is not aimv2:FOLDER_OR_HUB_ID or hf:FOLDER_OR_HUB_ID"),
        ("aimv2:x?size=3", "is not aimv2:FOLDER_OR_HUB_ID"),
        ("aimv3:x", "begins with 'aimv3', and must be aimv2:.*did you mean aimv2"),
        ("aimv2:./gone", "./gone is not a folder"),
        ("aimv2:FOLDER?image_size=60", "image_size 60 is not a multiple of the patch size 14"),
        ("hf:FOLDER", "is AIMv2's: type aimv2:"),
        ("hf:FOLDER?image_size=112", "takes no .image_size"),
    ],
)
def test_a_wrong_name_is_refused_in_words_that_help(folder: Path, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_source(name.replace("FOLDER", str(folder), 1) if name.count("FOLDER") else name)


def test_names_of_ours_begin_with_a_word_of_the_table() -> None:
    assert list(SOURCES) == ["aimv2", "hf"]
    assert is_source("aimv2:x")
    assert is_source("hf:a/b")
    assert not is_source("openai/clip-vit-large-patch14-336")
    assert not is_source(r"C:\clip")
    assert not is_source(None)


def test_a_folder_that_does_not_say_how_pixels_are_made_is_refused(tmp_path: Path) -> None:
    folder = make_tower(tmp_path / "tower")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match="nobody knows its image size"):
        VisionTower(f"aimv2:{folder}")


def processor(folder: Path) -> ImageProcessor:
    return VisionTower(f"aimv2:{folder}").image_processor


def test_the_image_processor_has_plain_dicts_and_takes_one_picture_or_several(
    folder: Path,
) -> None:
    ours = processor(folder)
    assert type(ours.size) is dict
    assert type(ours.crop_size) is dict
    assert ours.size == {"shortest_edge": 56}
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8))
    one = ours.preprocess(picture, return_tensors="pt")["pixel_values"]
    assert one.shape == (1, 3, 56, 56)
    assert torch.equal(ours([picture, picture])["pixel_values"][1], one[0])
    expected = Preprocessing.load(folder).prepare([picture])
    assert torch.equal(one, expected)
    with pytest.raises(UsageError, match="return_tensors is 'np'"):
        ours.preprocess(picture, return_tensors="np")


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("size", [(1, 1), (30, 400), (5000, 10), (640, 480), (4000, 3000)])
def test_native_pictures_keep_their_shape_within_the_range(
    native: Path, size: tuple[int, int], multiple: int
) -> None:
    ours = processor(native)
    ours.multiple = multiple
    [values] = ours.preprocess(Image.new("RGB", size))["pixel_values"]
    rows, columns = values.shape[1] / 14, values.shape[2] / 14
    assert rows % multiple == columns % multiple == 0
    assert MIN_PATCHES <= rows * columns <= MAX_PATCHES
    if size == (640, 480):
        assert columns / rows == pytest.approx(640 / 480, rel=0.1)
        assert values.shape[2] == pytest.approx(640, abs=14 * multiple)


def test_names_of_weights_are_ours_whatever_transformers_there_is(folder: Path) -> None:
    names = set(VisionTower(f"aimv2:{folder}").state_dict())
    own = json.loads((folder / "config.json").read_text())
    assert own["model_type"] == "aimv2"
    assert "vision_tower.trunk.blocks.0.attn.qkv.weight" in names
    leaves = {name.split(".")[-2] for name in names if name.count(".") > 1}
    llama = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not leaves & llama
