"""Encoders on disk: round trips bit for bit, the two namings, and every refusal."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Aimv2VisionConfig, Aimv2VisionModel

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.weights import (
    from_transformers,
    load_encoder,
    save_encoder,
    to_transformers,
    transformers_config,
)


def tiny_encoder(native: bool = False) -> AIMv2Encoder:
    torch.manual_seed(0)
    encoder = AIMv2Encoder(EncoderConfig(16, 24, 2, 2, image_size=56, native=native))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
    return encoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_encoder(tiny_encoder(), tmp_path)
    return tmp_path


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def change_config(folder: Path, **changes: object) -> None:
    """Rewrite config.json with `changes`; a value of None takes the key out."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.mark.parametrize("native", [False, True])
def test_a_saved_encoder_comes_back_bit_for_bit(tmp_path: Path, native: bool) -> None:
    encoder = tiny_encoder(native)
    save_encoder(encoder, tmp_path / "new" / "folder")
    loaded = load_encoder(tmp_path / "new" / "folder")
    assert loaded.config == encoder.config
    assert_same(loaded.state_dict(), encoder.state_dict())
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_bfloat16_encoder_stays_bfloat16(tmp_path: Path) -> None:
    encoder = tiny_encoder().bfloat16()
    save_encoder(encoder, tmp_path)
    assert_same(load_encoder(tmp_path).state_dict(), encoder.state_dict())


def test_a_loaded_encoder_can_be_trained_and_saved_where_it_came_from(folder: Path) -> None:
    encoder = load_encoder(folder)
    encoder(torch.randn(1, 3, 56, 56)).sum().backward()
    with torch.no_grad():
        for parameter in encoder.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    kept = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    save_encoder(encoder, folder)
    assert_same(encoder.state_dict(), kept)
    assert_same(load_encoder(folder).state_dict(), kept)


def test_a_loaded_encoder_survives_that_another_is_saved_over_its_file(folder: Path) -> None:
    """Loading maps the file into memory: writing into it would change the loaded weights."""
    encoder = load_encoder(folder)
    other = tiny_encoder()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    save_encoder(other, folder)
    assert_same(encoder.state_dict(), tiny_encoder().state_dict())


def test_the_config_written_has_the_keys_of_the_first_release(tmp_path: Path) -> None:
    save_encoder(tiny_encoder(), tmp_path / "fixed")
    save_encoder(tiny_encoder(native=True), tmp_path / "native")
    fixed = json.loads((tmp_path / "fixed" / "config.json").read_text())
    assert fixed == {
        "model_type": "aimv2",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_channels": 3,
        "image_size": 56,
        "patch_size": 14,
        "rms_norm_eps": 1e-5,
        "qkv_bias": False,
        "use_bias": False,
    }
    native = json.loads((tmp_path / "native" / "config.json").read_text())
    assert native == {k: v for k, v in fixed.items() if k != "image_size"} | {"num_queries": 16}


@pytest.mark.parametrize("native", [False, True])
def test_renaming_there_and_back_changes_nothing(native: bool) -> None:
    state = tiny_encoder(native).state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    assert_same(from_transformers(to_transformers(state)), before)
    assert_same(state, before)


@pytest.mark.parametrize("native", [False, True])
def test_transformers_loads_the_renamed_tensors_strictly(native: bool) -> None:
    encoder = tiny_encoder(native)
    model = Aimv2VisionModel(Aimv2VisionConfig(**transformers_config(encoder.config)))
    model.load_state_dict(to_transformers(encoder.state_dict()), strict=True)
    assert_same(from_transformers(model.state_dict()), encoder.state_dict())


@pytest.mark.parametrize("native", [False, True])
def test_a_folder_written_by_transformers_is_read(tmp_path: Path, native: bool) -> None:
    encoder = tiny_encoder(native)
    model = Aimv2VisionModel(Aimv2VisionConfig(**transformers_config(encoder.config)))
    model.load_state_dict(to_transformers(encoder.state_dict()), strict=True)
    model.save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.config == encoder.config
    assert_same(loaded.state_dict(), encoder.state_dict())


@pytest.mark.parametrize("native", [False, True])
def test_transformers_reads_a_folder_of_renamed_tensors_and_our_config(
    tmp_path: Path, native: bool
) -> None:
    encoder = tiny_encoder(native)
    (tmp_path / "config.json").write_text(json.dumps(transformers_config(encoder.config)))
    metadata = {"format": "pt"}
    save_file(to_transformers(encoder.state_dict()), tmp_path / "model.safetensors", metadata)
    model = Aimv2VisionModel.from_pretrained(tmp_path)
    assert_same(from_transformers(model.state_dict()), encoder.state_dict())
    config = model.config
    assert (config.use_head, config.is_native, config.tie_last_hidden_states) == (
        False,
        native,
        True,
    )


def test_the_queries_keys_and_values_are_split_in_that_order() -> None:
    state = {"trunk.blocks.11.attn.qkv.weight": torch.arange(12.0).view(6, 2)}
    split = to_transformers(state)
    layer = "encoder.layers.11.attention"
    assert {name: tensor[0, 0].item() for name, tensor in split.items()} == {
        f"{layer}.q_proj.weight": 0,
        f"{layer}.k_proj.weight": 4,
        f"{layer}.v_proj.weight": 8,
    }


def test_names_of_something_else_are_refused_in_both_directions() -> None:
    with pytest.raises(UsageError, match=r"trunk.blocks.0.attn.q_norm.weight is not a tensor"):
        to_transformers({"trunk.blocks.0.attn.q_norm.weight": torch.zeros(1)})
    with pytest.raises(UsageError, match=r"head.cls_token is not a tensor"):
        from_transformers({"head.cls_token": torch.zeros(1)})
    name = "encoder.layers.0.attention.k_proj.weight"
    with pytest.raises(UsageError, match=r"q_proj.weight, .*v_proj.weight is missing"):
        from_transformers({name: torch.zeros(1, 1)})


def test_a_path_that_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is not a folder: give one that holds"):
        load_encoder(tmp_path / "nowhere")


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no config.json: give the folder"):
        load_encoder(folder)


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(UsageError, match=r"config.json is not JSON"):
        load_encoder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip"}, "model_type is 'clip', and must be one of aimv2, aimv2_vision"),
        ({"model_type": None}, "model_type is None"),
        ({"vision_config": {}}, "image-text .LiT. model"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"image_size": None}, "lacks image_size"),
        ({"qkv_bias": True}, "qkv_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_attention_heads": 3}, "16 is not divisible by num_attention_heads 3"),
        ({"image_size": [56, 70]}, "sizes are square"),
        ({"patch_size": "14"}, "'14'"),
    ],
)
def test_a_config_of_something_else_is_refused(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    change_config(folder, **changes)
    with pytest.raises(UsageError, match=message):
        load_encoder(folder)


def test_a_config_that_is_a_list_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="model_type is None"):
        load_encoder(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no model.safetensors"):
        load_encoder(folder)


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_weights_that_are_cut_off_are_refused(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UsageError, match="is cut off or not a safetensors file"):
        load_encoder(folder)


def test_each_tensor_that_does_not_fit_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    gone = state.pop("trunk.blocks.1.norm_2.weight")
    state["trunk.blocks.2.norm_2.weight"] = gone
    state["preprocessor.pos_embed"] = torch.zeros(1, 4, 16)
    save_file(state, path)
    with pytest.raises(UsageError) as caught:
        load_encoder(folder)
    message = str(caught.value)
    assert "trunk.blocks.1.norm_2.weight is missing" in message
    assert "trunk.blocks.2.norm_2.weight is left over" in message
    assert "preprocessor.pos_embed has shape (1, 4, 16) instead of (1, 16, 16)" in message


def test_a_tensor_is_named_as_its_file_names_it(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    (tmp_path / "config.json").write_text(json.dumps(transformers_config(encoder.config)))
    state = to_transformers(encoder.state_dict())
    state.pop("encoder.layers.0.attention.k_proj.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"layers.0.attention.k_proj.weight is missing"):
        load_encoder(tmp_path)


def test_a_native_file_does_not_load_into_learned_positions(tmp_path: Path) -> None:
    save_encoder(tiny_encoder(native=True), tmp_path)
    change_config(tmp_path, image_size=56, num_queries=None)
    with pytest.raises(UsageError, match=r"preprocessor.pos_embed is missing"):
        load_encoder(tmp_path)
