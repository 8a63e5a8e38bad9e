"""AIMv2 and our connectors inside nanoVLM, a checkout of which AIMV2_TEST_NANOVLM names."""

import sys
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from host_runs import run_host

import aimv2_mllm
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.connectors import CONNECTORS
from aimv2_mllm.towers import nanovlm

TOKENIZER = Path(aimv2_mllm.__file__).parent / "assets" / "tiny_llm"
# What the driver builds: towers with nanoVLM's own projector, and our connectors on one of them.
TOWERS = ("plain", "native", "resized")
TOKENS = {"linear": 16, "mlp": 16, "pixel_shuffle": 4, "average_pool": 4, "resampler": 3} | {
    "c_abstractor": 4
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_host("nanovlm", tmp_path_factory.mktemp("nanovlm"), TOKENIZER)


def models(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if "reloaded_logits" in value}


def test_every_connector_and_kind_of_tower_is_tried(found: dict[str, Any]) -> None:
    tried = [name.partition(":")[0] for name in models(found)]
    assert tried == [*TOWERS, *CONNECTORS]


def test_the_tower_gives_our_features_of_normalised_pixels(found: dict[str, Any]) -> None:
    assert {name: model["tower"] for name, model in models(found).items() if model["tower"]} == {}


def test_a_saved_model_is_the_same_when_it_is_read(found: dict[str, Any]) -> None:
    for name, model in models(found).items():
        assert model["reloaded_features"] == 0, name
        assert model["reloaded_logits"] == 0, name
        assert model["answer_again"] == model["answer"], name


def test_every_parameter_gets_a_gradient(found: dict[str, Any]) -> None:
    for name, model in models(found).items():
        assert model["grads"] == model["parameters"], name


def test_images_become_as_many_tokens_as_the_config_says(found: dict[str, Any]) -> None:
    counted = {name.partition(":")[0]: model["tokens"] for name, model in models(found).items()}
    assert counted == {"plain": 4, "native": 4, "resized": 9, **TOKENS}


def test_a_native_tower_is_known_by_its_config_alone(found: dict[str, Any]) -> None:
    assert found["native"]["word"].startswith("aimv2-native:")
    assert found["plain"]["word"].startswith("aimv2:")


def test_nanovlms_own_tower_is_built_as_before(found: dict[str, Any]) -> None:
    assert found["stock"] == {"tower": True, "projector": "ModalityProjector"}


def test_its_own_program_trains_the_tower_and_saves_all_that_it_needs(
    found: dict[str, Any],
) -> None:
    train = found["train"]
    if train is None:
        pytest.skip("nanoVLM's train.py needs datasets, which its interpreter has not")
    assert train["finite"]
    # Statistics of pixels are no parameters; all else moved, also what weight decay leaves alone.
    assert train["kept"] == ["mean", "std"]
    assert "encoder.preprocessor.patchifier.proj.bias" in train["moved"]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("bare", "type aimv2:"),
        ("misspelt", "did you mean aimv2? Type aimv2:"),
        ("size", "write vit_img_size=56"),
        ("nowhere", "/no/such/folder is not a folder"),
        ("grid", "factors for that grid are 1, 2, 4"),
        ("connector", "did you mean pixel_shuffle?"),
        ("tokens", "becomes 4 tokens: write 4"),
        ("field", "VLMConfig has no field vit_depth"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(found: dict[str, Any], case: str, says: str) -> None:
    message = found["refusals"][case]
    assert message.startswith("UsageError: ")
    assert says in message
    assert "\n" not in message


def fake_host(monkeypatch: pytest.MonkeyPatch, *fields: str) -> None:
    package, config, vlm = (ModuleType(n) for n in ("models", nanovlm.CONFIG, nanovlm.VLM))
    config.VLMConfig = make_dataclass("VLMConfig", [(n, int, 0) for n in fields])  # type: ignore[attr-defined]
    for part in nanovlm.PARTS:
        setattr(vlm, part, object)
    for module in (package, config, vlm):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_without_nanovlm_the_message_says_where_to_start() -> None:
    with pytest.raises(UsageError, match="nanoVLM is not here: start in its checkout"):
        nanovlm.install()


def test_an_old_nanovlm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_host(monkeypatch, *nanovlm.FIELDS[:-1])
    with pytest.raises(UsageError, match=r"no VLMConfig\.mp_image_token_length: update"):
        nanovlm.install()


def test_a_program_that_has_bound_the_classes_already_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_host(monkeypatch, *nanovlm.FIELDS)
    train = ModuleType("train")
    train.VisionLanguageModel = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "train", train)
    with pytest.raises(UsageError, match="call install"):
        nanovlm.install()
