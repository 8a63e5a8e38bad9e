"""Encoders on disk: round trips bit for bit, the three layouts, shards, and every refusal."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_namings import LAYOUTS, assert_same, tiny_encoder
from transformers import Aimv2VisionConfig, Aimv2VisionModel

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.encoder import AIMv2Encoder
from aimv2_mllm.model.layouts import transformers_config
from aimv2_mllm.model.namings import NAMINGS, rename
from aimv2_mllm.model.weights import load_encoder, resize_positions, save_encoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_encoder(tiny_encoder(), tmp_path)
    return tmp_path


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


def twin(encoder: AIMv2Encoder) -> Aimv2VisionModel:
    """transformers' own network with the weights of `encoder`."""
    model = Aimv2VisionModel(Aimv2VisionConfig(**transformers_config(encoder.config)))
    renamed = rename(encoder.state_dict(), NAMINGS["transformers"])
    model.load_state_dict(renamed, strict=True)
    return model.eval()


@pytest.mark.parametrize("native", [False, True])
def test_a_folder_written_by_transformers_is_read(tmp_path: Path, native: bool) -> None:
    encoder = tiny_encoder(native)
    twin(encoder).save_pretrained(tmp_path)
    loaded = load_encoder(tmp_path)
    assert loaded.config == encoder.config
    assert_same(loaded.state_dict(), encoder.state_dict())


@pytest.mark.parametrize("native", [False, True])
def test_transformers_loads_our_folder_whole_and_computes_the_same(
    tmp_path: Path, native: bool
) -> None:
    encoder = tiny_encoder(native).eval()
    save_encoder(encoder, tmp_path, layout="transformers")
    model, report = Aimv2VisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = model.config
    assert (config.use_head, config.is_native) == (False, native)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        theirs = model.eval()(pixels, output_hidden_states=True)
        assert torch.allclose(encoder(pixels), theirs.last_hidden_state, atol=1e-5)
    assert torch.equal(theirs.hidden_states[-1], theirs.last_hidden_state)


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_every_layout_to_every_other_is_bit_equal(tmp_path: Path, first: str, second: str) -> None:
    encoder = tiny_encoder()
    save_encoder(encoder, tmp_path / "a", layout=first)
    save_encoder(load_encoder(tmp_path / "a"), tmp_path / "b", layout=second)
    loaded = load_encoder(tmp_path / "b")
    assert loaded.config == encoder.config
    assert_same(loaded.state_dict(), encoder.state_dict())


@pytest.mark.parametrize("first", ["original", "transformers"])
@pytest.mark.parametrize("second", ["original", "transformers"])
def test_native_encoders_go_between_the_layouts_that_have_them(
    tmp_path: Path, first: str, second: str
) -> None:
    encoder = tiny_encoder(native=True)
    save_encoder(encoder, tmp_path / "a", layout=first)
    save_encoder(load_encoder(tmp_path / "a"), tmp_path / "b", layout=second)
    loaded = load_encoder(tmp_path / "b")
    assert loaded.config == encoder.config
    assert_same(loaded.state_dict(), encoder.state_dict())


def test_one_folder_can_change_its_layout(folder: Path) -> None:
    encoder = load_encoder(folder)
    for layout in LAYOUTS:
        save_encoder(encoder, folder, layout=layout)
        encoder = load_encoder(folder)
    assert_same(encoder.state_dict(), tiny_encoder().state_dict())


def test_timm_has_no_native_encoder_and_the_refusal_says_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no native AIMv2: timm's have learned positions"):
        save_encoder(tiny_encoder(native=True), tmp_path / "new", layout="timm")
    assert not (tmp_path / "new").exists()


def test_an_unknown_layout_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must be one of original, .*did you mean transformers"):
        save_encoder(tiny_encoder(), tmp_path / "new", layout="transformer")


def test_a_timm_folder_with_a_classifier_is_refused(tmp_path: Path) -> None:
    save_encoder(tiny_encoder(), tmp_path, layout="timm")
    add_tensor(tmp_path, "head.weight")
    with pytest.raises(UsageError, match=r"head.weight is left over: give an encoder without"):
        load_encoder(tmp_path)


def test_names_under_a_prefix_are_an_encoder_too(tmp_path: Path) -> None:
    save_encoder(tiny_encoder(), tmp_path, layout="transformers")
    state = load_file(tmp_path / "model.safetensors")
    save_file({f"vision_model.{n}": t for n, t in state.items()}, tmp_path / "model.safetensors")
    assert_same(load_encoder(tmp_path).state_dict(), tiny_encoder().state_dict())


def add_tensor(folder: Path, name: str) -> None:
    state = {n: tensor.clone() for n, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state | {name: torch.zeros(2, 2)}, folder / "model.safetensors")


def test_a_pooling_head_beside_the_encoder_is_left_aside_aloud(tmp_path: Path) -> None:
    """transformers' vision model has one by default."""
    encoder = tiny_encoder()
    raw = transformers_config(encoder.config) | {"use_head": True}
    model = Aimv2VisionModel(Aimv2VisionConfig(**raw))
    state = rename(encoder.state_dict(), NAMINGS["transformers"])
    model.load_state_dict(state, strict=False)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"left aside: image_encoder.head \(5 tensors\)"):
        loaded = load_encoder(tmp_path)
    assert_same(loaded.state_dict(), encoder.state_dict())


# Resolution


def test_a_resized_table_is_transformers_bicubic_and_the_rest_is_untouched(folder: Path) -> None:
    """transformers resizes other learned positions so: the same grid, seen through another way."""
    from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

    with pytest.warns(UserWarning, match=r"resized to 84 px \(6 x 6\)"):
        resized = load_encoder(folder, image_size=84)
    assert resized.config.image_size == 84
    before, after = tiny_encoder().state_dict(), resized.state_dict()
    table = before.pop("preprocessor.pos_embed")
    new = after.pop("preprocessor.pos_embed")
    assert_same(before, after)

    class Embeddings:
        patch_size = 14
        position_embedding = torch.nn.Embedding.from_pretrained(table[0])
        num_positions = 16

    expected = SiglipVisionEmbeddings.interpolate_pos_encoding(
        Embeddings(), torch.empty(1, 36, 16), 84, 84
    )
    assert torch.allclose(new, expected, atol=1e-6)
    assert resized(torch.randn(1, 3, 84, 84)).shape == (1, 36, 16)


def test_rows_and_columns_keep_their_places_when_resized() -> None:
    """A table that only grows along the row must still do so, and be flat along the column."""
    row = torch.arange(4.0).repeat_interleave(4)  # the row of each of 16 patches
    table = resize_positions(torch.stack([row, 0 * row], dim=-1)[None], 8)  # (1, 64, 2)
    grid = table[0, :, 0].view(8, 8)
    assert (grid.diff(dim=0)[1:-1] > 0).all()
    assert torch.allclose(grid.diff(dim=1), torch.zeros(8, 7), atol=1e-6)


@pytest.mark.parametrize("side", [16, 24, 32])
def test_released_sizes_turn_into_each_other_in_their_dtype(side: int) -> None:
    for before in (16, 24, 32):
        table = torch.randn(1, before**2, 8).bfloat16()
        resized = resize_positions(table, side)
        assert resized.shape == (1, side**2, 8)
        assert resized.dtype == torch.bfloat16
        assert before != side or resized is table


def test_the_size_that_it_has_changes_nothing(folder: Path, recwarn: object) -> None:
    assert_same(load_encoder(folder, image_size=56).state_dict(), tiny_encoder().state_dict())
    assert not list(recwarn)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (225, "image_size 225 is not a multiple of the patch size 14: give 224 or 238"),
        (0, "must be a whole number of at least 14, not 0"),
        (-14, "must be a whole number of at least 14, not -14"),
        (13, "must be a whole number of at least 14, not 13"),
    ],
)
def test_a_size_that_cannot_be_is_refused(folder: Path, size: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_encoder(folder, image_size=size)


def test_a_native_encoder_is_not_resized(tmp_path: Path) -> None:
    save_encoder(tiny_encoder(native=True), tmp_path)
    with pytest.raises(UsageError, match="computes its positions and takes any size"):
        load_encoder(tmp_path, image_size=84)


# What is refused


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
        ({"vision_config": []}, "vision_config is .., and must be a config"),
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
    save_encoder(tiny_encoder(), tmp_path, layout="transformers")
    state = load_file(tmp_path / "model.safetensors")
    state.pop("encoder.layers.0.attention.k_proj.weight")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"layers.0.attention.k_proj.weight is missing"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_extra_tensor_is_named(tmp_path: Path, layout: str) -> None:
    save_encoder(tiny_encoder(), tmp_path, layout=layout)
    add_tensor(tmp_path, "extra")
    with pytest.raises(UsageError, match="extra is"):
        load_encoder(tmp_path)


def test_whole_numbers_are_no_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    state["trunk.post_trunk_norm.weight"] = torch.ones(16, dtype=torch.int8)
    save_file(state, path)
    with pytest.raises(UsageError, match=r"post_trunk_norm.weight is int8, which is no floating"):
        load_encoder(folder)


def test_a_native_file_does_not_load_into_learned_positions(tmp_path: Path) -> None:
    save_encoder(tiny_encoder(native=True), tmp_path)
    change_config(tmp_path, image_size=56, num_queries=None)
    with pytest.raises(UsageError, match=r"preprocessor.pos_embed is missing"):
        load_encoder(tmp_path)
