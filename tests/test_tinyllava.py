"""AIMv2 and our connectors inside TinyLLaVA_Factory; AIMV2_TEST_TINYLLAVA names a checkout."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from host_runs import run_host

from aimv2_mllm.errors import UsageError
from aimv2_mllm.towers import tinyllava
from aimv2_mllm.towers.sources import open_source

TOKENS = {
    "plain": 16, "native": 16, "layer -2": 16, "aimv2:linear": 16, "aimv2:mlp:depth=3": 16,
    "pixel_shuffle:factor=2": 4, "average_pool:factor=2": 4,
    "aimv2:resampler:num_queries=3,num_heads=4": 3, "c_abstractor:target=2,depth=1": 4, "hf:clip": 4, "hf:siglip": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_host("tinyllava", tmp_path_factory.mktemp("TinyLLaVA"))


def models(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if "reloaded" in value}


def test_images_become_as_many_tokens_as_the_connector_says(found: dict[str, Any]) -> None:
    assert {name: model["tokens"] for name, model in models(found).items()} == TOKENS


def test_the_tower_gives_our_features_of_every_layer(found: dict[str, Any]) -> None:
    assert {name: model["tower"] for name, model in models(found).items() if model["tower"]} == {}


def test_all_is_frozen_until_a_recipe_says_otherwise(found: dict[str, Any]) -> None:
    assert all(model["frozen"] for model in models(found).values())


def test_every_parameter_that_is_used_gets_a_gradient(found: dict[str, Any]) -> None:
    for name, model in models(found).items():
        # What lies behind the layer that is asked for is not even computed.
        unused = ("blocks.2.", "post_trunk_norm") if name == "layer -2" else ()
        assert [n for n in model["no_gradient"] if not any(word in n for word in unused)] == []


def test_a_saved_model_with_a_tuned_tower_is_the_same_when_it_is_read(
    found: dict[str, Any],
) -> None:
    for name, model in models(found).items():
        assert model["reloaded"] == 0, name
        assert model["answers_equal"], name


def test_its_program_trains_both_stages_and_partially_tunes_the_last_block(
    found: dict[str, Any],
) -> None:
    stages = found["stages"]
    assert stages["first_stage_keeps"]
    assert len(stages["losses"]) == 2
    assert all(0 < loss < 10 for loss in stages["losses"])
    assert len(stages["moved"]) == 7
    assert all(name.startswith("trunk.blocks.2.") for name in stages["moved"])
    assert stages["origin"] == "checkpoint"


def test_its_own_names_stay_its_own(found: dict[str, Any]) -> None:
    assert found["stock"] == {
        "mlp2x_gelu": "MLPConnector", "linear": "LinearConnector", "clip": "CLIPVisionTower",
        "collision": "AIMv2Tower",
        "resampler": "ResamplerConnector", "identity": "IdentityConnector",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("bare", "type aimv2:"),
        ("misspelt", "did you mean aimv2? Type aimv2:"),
        ("nowhere", "/no/such/folder is not a folder"),
        ("grid", "factors for that grid are 1, 2, 4"),
        ("connector", "did you mean resampler?"),
        ("option", "did you mean factor?"),
        ("layer", "a number from -4 to 3"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(found: dict[str, Any], case: str, says: str) -> None:
    message = found["refusals"][case]
    assert message.startswith("UsageError: ")
    assert says in message
    assert "\n" not in message


def test_without_it_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyllava, "restore_names", lambda: None)
    monkeypatch.setitem(sys.modules, "tinyllava", None)
    with pytest.raises(UsageError, match="pip install --no-deps -e CHECKOUT"):
        tinyllava.install()


def test_one_without_registries_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinyllava, "restore_names", lambda: None)
    for name in tinyllava.NEEDS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(UsageError, match="VISION_TOWER_FACTORY: it is an old TinyLLaVA_Factory"):
        tinyllava.install()


def test_tuning_from_a_block_that_is_not_there_is_refused(tmp_path: Path) -> None:
    from llava_world import make_tower

    network = tinyllava.Network(f"aimv2:{make_tower(tmp_path / 'tower')}")
    with pytest.raises(UsageError, match="has 3 blocks: give a number below 3"):
        tinyllava.tune_from(network, 3)


def test_weights_saved_by_parameters_alone_are_known_to_be_whole(tmp_path: Path) -> None:
    from llava_world import make_tower

    name = f"aimv2:{make_tower(tmp_path / 'tower')}"
    tuned = {n: p + 1 for n, p in open_source(name).read().named_parameters()}
    network = tinyllava.Network(name)
    network.load_state_dict({f"vision_tower.{n}": p for n, p in tuned.items()}, strict=True)
    network.load_model()
    assert network.origin == "checkpoint"
    assert all(p.equal(tuned[n]) for n, p in network.vision_tower.named_parameters())
