"""AIMv2 and our connectors inside LLaVA-NeXT; AIMV2_TEST_LLAVA_NEXT names a checkout."""

import sys
from types import ModuleType
from typing import Any

import pytest
from host_runs import run_host

from aimv2_mllm.errors import UsageError
from aimv2_mllm.towers import llava_next

TOKENS = {
    "native": 16, "linear": 16, "mlp2x_gelu": 16, "mlp2x_res1x_gelu": 16, "aimv2:linear": 16,
    "mlp:depth=3": 16, "pixel_shuffle:factor=2": 4, "average_pool:factor=2": 4,
    "resampler:num_queries=3,num_heads=4": 3, "c_abstractor:target=2,depth=1": 4,
    "hf:clip": 4, "hf:siglip": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_host("llava_next", tmp_path_factory.mktemp("next"))


def models(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in TOKENS}


def test_images_become_as_many_tokens_as_the_connector_says(found: dict[str, Any]) -> None:
    assert {name: model["tokens"] for name, model in models(found).items()} == TOKENS


def test_the_tower_gives_our_features(found: dict[str, Any]) -> None:
    assert {name: model["tower"] for name, model in models(found).items() if model["tower"]} == {}


def test_the_tower_is_frozen_until_it_is_tuned_and_then_gets_gradients(
    found: dict[str, Any],
) -> None:
    for name, model in models(found).items():
        assert model["frozen"], name
        assert model["no_gradient"] == [], name


def test_our_linear_projector_is_its_own_by_another_word(found: dict[str, Any]) -> None:
    assert found["aimv2:linear"]["loss"] == found["linear"]["loss"]


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(
    ("case", "origin"), [("whole", "checkpoint"), ("tuned", "checkpoint"), ("without", "aimv2")]
)
def test_a_tuned_tower_is_kept_and_one_that_was_not_saved_comes_from_its_source(
    found: dict[str, Any], case: str, origin: str, low: bool
) -> None:
    loaded = found["reloads"][f"{case}, low memory {low}"]
    assert loaded == {"difference": 0, "origin": origin, "trainable": 0}


def test_a_model_that_is_read_answers_as_before(found: dict[str, Any]) -> None:
    assert found["reloads"]["answers_equal"]
    assert found["loader"] == {"origin": "checkpoint", "pixels": [3, 56, 56], "answer": 4}


def test_tiles_are_laid_together_by_the_grid_that_the_connector_leaves(
    found: dict[str, Any],
) -> None:
    # Five words; a base of 4 x 4 tokens; 8 x 8 of the tiles, of which a picture of 60 x 90 fills
    # 6 columns of the 8 (2 of 4 once they are joined), and a newline behind each row.
    assert found["tiles"]["mlp2x_gelu"] == {"tiles": 5, "length": 5 + 16 + 8 * (6 + 1)}
    assert found["tiles"]["pixel_shuffle"] == {"tiles": 5, "length": 5 + 4 + 4 * (2 + 1)}
    assert found["tiles"]["flat"] == {"tiles": 5, "length": 5 + 5 * 3}


def test_images_of_different_sizes_in_a_batch_are_as_one_by_one(found: dict[str, Any]) -> None:
    sizes = found["sizes"]
    assert sizes["lengths"] == [5 + 6, 5 + 8]  # 4 x 6 and 8 x 4 patches, four of which are a token
    assert sizes["difference"] < 1e-4


def test_its_program_trains_all_three_parts_and_saves_them(found: dict[str, Any]) -> None:
    if "program" not in found:
        pytest.skip("LLaVA-NeXT's trainer needs transformers of its time (4.40)")
    program = found["program"]
    assert len(program["losses"]) == 2
    assert all(0 < loss < 10 for loss in program["losses"])
    assert program["moved"] == program["of"] == 26
    assert program["origin"] == "checkpoint"


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("bare", "type aimv2:"),
        ("misspelt", "did you mean aimv2? Type aimv2:"),
        ("nowhere", "/no/such/folder is not a folder"),
        ("grid", "factors for that grid are 1, 2, 4"),
        ("connector", "did you mean resampler?"),
        ("merge", "give --mm_patch_merge_type flat"),
        ("s2", "leave --s2 out"),
        ("feature", "must be patch"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(found: dict[str, Any], case: str, says: str) -> None:
    message = found["refusals"][case]
    assert message.startswith("UsageError: ")
    assert says in message
    assert "\n" not in message


@pytest.fixture
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava_next, "restore_names", lambda: None)


@pytest.mark.usefixtures("no_names")
def test_without_it_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("llava.")]:  # LLaVA's own
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llava", None)
    with pytest.raises(UsageError, match="pip install --no-deps -e CHECKOUT of LLaVA-NeXT"):
        llava_next.install()


@pytest.mark.usefixtures("no_names")
def test_llava_itself_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in llava_next.NEEDS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(UsageError, match="or another package of that name"):
        llava_next.install()


@pytest.mark.usefixtures("no_names")
def test_an_import_that_it_only_prints_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("cannot import name 'LlavaLlamaForCausalLM'")

    monkeypatch.setattr("aimv2_mllm.towers.hosts.import_module", fail)
    with pytest.raises(UsageError, match="see what it has printed before this"):
        llava_next.install()
