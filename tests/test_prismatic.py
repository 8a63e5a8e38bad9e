"""AIMv2 and our connectors inside prismatic-vlms; AIMV2_TEST_PRISMATIC names a checkout."""

import sys
from types import ModuleType
from typing import Any

import pytest
from host_runs import run_host
from PIL import Image

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.towers import prismatic

TOKENS = {
    "native": 16, "hf:clip": 16, "hf:siglip": 16, "linear": 16, "no-align+gelu-mlp": 16, "fused-gelu-mlp": 16, "aimv2:linear": 16,
    "mlp:depth=3": 16, "pixel_shuffle:factor=2": 4, "no-align+average_pool:factor=2": 4,
    "resampler:num_queries=3,num_heads=4": 3, "c_abstractor:target=2,depth=1": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_host("prismatic", tmp_path_factory.mktemp("prismatic"))


def models(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if "wrapped" in value}


def test_images_become_as_many_tokens_as_the_connector_says(found: dict[str, Any]) -> None:
    assert {name: model["tokens"] for name, model in models(found).items()} == TOKENS


def test_the_backbone_gives_our_features(found: dict[str, Any]) -> None:
    assert {name: model["tower"] for name, model in models(found).items() if model["tower"]} == {}


def test_its_stages_train_what_they_say(found: dict[str, Any]) -> None:
    for name, model in models(found).items():
        assert model["no_gradient"] == [], name  # full-finetune
        assert model["align"] == ["projector"], name


def test_fsdp_wraps_every_block_the_encoder_and_the_connector(found: dict[str, Any]) -> None:
    for name, model in models(found).items():
        if name.startswith("hf:"):  # as one piece
            assert "Block" not in model["wrapped"]
            continue
        assert model["wrapped"]["Block"] == 3, name
        assert model["wrapped"]["AIMv2Encoder"] == 1, name
        assert len(model["wrapped"]) == 4, name  # and the LLM's layers, and the connector


def test_a_trained_backbone_is_read_again(found: dict[str, Any]) -> None:
    trained = found["trained"]
    assert trained["moved"] == trained["of"] == 26
    assert trained["reloaded"] == 0
    assert trained.get("answers_equal", True)


def test_pictures_are_made_square_as_prismatic_does_it(found: dict[str, Any]) -> None:
    assert [*found["transforms"]] == [*prismatic.STRATEGIES]
    assert max(found["transforms"].values()) < 1e-6  # the same sums in another order


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("bare", "type aimv2:"),
        ("misspelt", "did you mean aimv2? Type aimv2:"),
        ("nowhere", "/no/such/folder is not a folder"),
        ("grid", "factors for that grid are 1, 2, 4"),
        ("connector", "did you mean average_pool?"),
        ("strategy", "must be one of resize-naive, resize-crop, letterbox"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(found: dict[str, Any], case: str, says: str) -> None:
    message = found["refusals"][case]
    assert message.startswith("UsageError: ")
    assert says in message
    assert "\n" not in message


def test_a_name_that_nobody_has_is_refused_by_prismatic_itself(found: dict[str, Any]) -> None:
    assert found["refusals"]["host"] == (
        "ValueError: Vision Backbone `no-such-backbone` is not supported!"
    )


def test_the_registry_keeps_what_it_had_and_knows_our_words() -> None:
    registry = prismatic.Backbones({"clip-vit-l": 1}, object)
    assert registry["clip-vit-l"] == 1
    assert "aimv2:somewhere" in registry
    assert registry["aimv2:somewhere"] == {"cls": object, "kwargs": {}}
    assert list(registry) == ["clip-vit-l"]
    assert "clip-vit-b" not in registry
    with pytest.raises(KeyError):
        registry["clip-vit-b"]


def test_without_it_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prismatic", None)
    with pytest.raises(UsageError, match="pip install --no-deps -e CHECKOUT of prismatic-vlms"):
        prismatic.install()


def test_one_without_a_registry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in prismatic.NEEDS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(UsageError, match="VISION_BACKBONES: it is an old prismatic-vlms"):
        prismatic.install()


def test_letterbox_shows_the_whole_picture() -> None:
    transform = prismatic.ImageTransform(Preprocessing(56, (0.5,) * 3, (0.5,) * 3), "letterbox")
    values = transform(Image.new("RGB", (112, 56), "white"))
    assert values.shape == (3, 56, 56)
    assert values[:, 28].eq(1).all()  # white from edge to edge
    assert values[:, 0].abs().max() < 0.01  # the rim has the mean's colour
