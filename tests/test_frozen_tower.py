"""The frozen tower: the same bits whoever else is looked at, a name for whatever decides them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_towers import saved

from aimv2_mllm.model import llms, mllm
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.frozen_tower import FrozenTower, digest_of
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.towers import Tower, load_tower
from aimv2_mllm.model.weights import save_encoder

PREPROCESSING = Preprocessing(28)
TOWERS = ("aimv2", "native", "clip", "siglip", "siglip2", "dinov2", "dinov3_vit")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny tower of each kind."""
    root = tmp_path_factory.mktemp("towers")
    for kind in TOWERS:
        if kind in ("aimv2", "native"):
            torch.manual_seed(0)
            config = EncoderConfig(16, 24, 2, 2, image_size=28, native=kind == "native")
            save_encoder(AIMv2Encoder(config), root / kind)
            Preprocessing(28, native=kind == "native").save(root / kind)
        else:
            saved(kind, root / kind)
    return {kind: root / kind for kind in TOWERS}


def llava(tower: Tower, connector: str = "mlp") -> Any:
    torch.manual_seed(0)
    llm, tokenizer = llms.load_llm("tiny_llm"), llms.load_tokenizer("tiny_llm")
    return mllm.assemble(tower, llm, tokenizer, connector=connector).eval()


def name(tower: Tower, preprocessing: Preprocessing = PREPROCESSING, **words: Any) -> str:
    frozen = FrozenTower(llava(tower, **words).model, torch.float32)
    return digest_of(frozen.about(preprocessing))


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("layers", [-1, [-2, -1]])
def test_what_it_reads_is_what_the_llava_gives_its_connector(
    kind: str, layers: Any, folders: dict[str, Path]
) -> None:
    model = llava(load_tower(folders[kind], layers=layers))
    side = 28
    pixels = torch.randn(3, 3, side, side)
    with torch.no_grad():
        expected = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
        frozen = FrozenTower(model.model, torch.float32)
        features = frozen.read(pixels)
        is_cached = torch.tensor([False, True, False])
        connector = model.model.multi_modal_projector
        found = frozen.embedded(connector, features[[1]], pixels[[0, 2]], is_cached)
    assert not hasattr(model.model.vision_tower, "config")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found, connector(features))
    assert (frozen.num_kept, frozen.num_read) == (1, 2)
    frozen.put_back()
    with torch.no_grad():
        again = torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))
    assert torch.equal(again, expected)


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_picture_has_the_same_bits_whoever_stands_beside_it(
    at_once: int, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aimv2_mllm.model.frozen_tower.AT_ONCE", {"cpu": at_once})
    frozen = FrozenTower(llava(load_tower(folders["aimv2"])).model, torch.float32)
    pixels = torch.randn(11, 3, 28, 28)
    together = frozen.read(pixels)
    for order in (torch.randperm(11), torch.tensor([10]), torch.tensor([3, 7])):
        assert torch.equal(frozen.read(pixels[order]), together[order])


def test_another_connector_has_the_same_features(folders: dict[str, Path]) -> None:
    tower = load_tower(folders["aimv2"])
    assert name(tower) == name(tower, connector="pixel_shuffle") == name(tower, connector="linear")
    assert name(load_tower(folders["siglip"])) == name(
        load_tower(folders["siglip"]), connector="linear"
    )


def test_whatever_decides_the_features_changes_the_name(folders: dict[str, Path]) -> None:
    own = name(load_tower(folders["aimv2"]))
    changed = load_tower(folders["aimv2"])
    weight = next(p for n, p in changed.named_parameters() if "fc1" in n)
    weight.data.view(torch.uint8).view(-1)[0] ^= 1  # the last bit of one weight
    tower = load_tower(folders["aimv2"])
    half = FrozenTower(llava(tower).model, torch.bfloat16).about(PREPROCESSING)
    others = [
        name(changed),
        name(load_tower(folders["native"])),
        name(load_tower(folders["aimv2"], image_size=56), Preprocessing(56)),
        name(load_tower(folders["aimv2"], layers=-2)),
        name(load_tower(folders["aimv2"], layers=[-2, -1])),
        name(load_tower(folders["aimv2"], norm="pre")),
        name(tower, replace(PREPROCESSING, mean=(0.5, 0.5, 0.5))),
        name(tower, replace(PREPROCESSING, image_size=56)),
        digest_of(half),
    ]
    assert len({own, *others}) == 1 + len(others)
