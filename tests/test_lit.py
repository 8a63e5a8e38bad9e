"""LiT models: equal to transformers' own on random weights, in both namings, whole or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_namings import assert_same, tiny_encoder
from torch import Tensor
from transformers import Aimv2Config, Aimv2Model

import aimv2_mllm
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.encoder import SIZES, EncoderConfig
from aimv2_mllm.model.layouts import VISION_DEFAULTS
from aimv2_mllm.model.lit import AIMv2LiT, LiTConfig, TextConfig
from aimv2_mllm.model.lit_weights import load_lit, save_lit
from aimv2_mllm.model.weights import load_encoder, save_encoder

LAYOUTS = ("original", "transformers")
END = 29  # the end-of-text token of the tiny text tower
VISION = EncoderConfig(16, 24, 2, 2, image_size=56)
TEXT = TextConfig(8, 12, 2, 2, vocab_size=30, max_position_embeddings=7, eos_token_id=END)


def tiny_lit() -> AIMv2LiT:
    torch.manual_seed(0)
    model = AIMv2LiT(LiTConfig(VISION, TEXT, projection_dim=12))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_logit_scale":
                parameter.normal_(std=0.3)
    return model.eval()


def pixels() -> Tensor:
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def texts() -> Tensor:
    """Four texts of different lengths, after their end filled with whatever."""
    ids = torch.randint(0, END, (4, 7), generator=torch.Generator().manual_seed(2))
    ids[torch.arange(4), torch.tensor([2, 6, 0, 4])] = END
    ids[3, 6] = END  # a second end, which is not the text's
    return ids


def theirs(model: AIMv2LiT, folder: Path) -> Any:
    """transformers' own model, loaded from a folder that we wrote.

    With eager attention and a mask: without a mask, and under sdpa with one of ones alone, the text
    tower of transformers 5.23 is not causal, as it was trained to be and the first release has it.
    """
    save_lit(model, folder)
    loaded, report = Aimv2Model.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


def test_images_texts_and_logits_are_those_of_transformers(tmp_path: Path) -> None:
    model = tiny_lit()
    twin = theirs(model, tmp_path)
    with torch.no_grad():
        expected = twin(
            pixel_values=pixels(), input_ids=texts(), attention_mask=torch.ones(4, 7).long()
        )
        assert torch.allclose(model.encode_image(pixels()), expected.image_embeds, atol=1e-5)
        assert torch.allclose(model.encode_text(texts()), expected.text_embeds, atol=1e-5)
        logits = model(pixels(), texts())
    assert logits.shape == (3, 4)
    assert torch.allclose(logits, expected.logits_per_image, atol=1e-5)


@pytest.mark.parametrize("log_scale", [-1.0, 0.5, 9.0])
def test_the_scale_is_kept_between_1_and_100_as_in_transformers(
    tmp_path: Path, log_scale: float
) -> None:
    model = tiny_lit()
    with torch.no_grad():
        model.log_logit_scale.fill_(log_scale)
        logits = model(pixels(), texts())
        cosines = model.encode_image(pixels()) @ model.encode_text(texts()).t()
        expected = theirs(model, tmp_path)(
            pixel_values=pixels(), input_ids=texts(), attention_mask=torch.ones(4, 7).long()
        ).logits_per_image
    scale = min(max(torch.tensor(log_scale).exp().item(), 1.0), 100.0)
    assert torch.allclose(logits, scale * cosines, atol=1e-4)
    assert torch.allclose(logits, expected, atol=1e-4)


def test_a_new_model_starts_at_the_temperature_of_the_paper() -> None:
    assert tiny_lit().log_logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_every_vector_has_length_1() -> None:
    model = tiny_lit()
    with torch.no_grad():
        for vectors in (model.encode_image(pixels()), model.encode_text(texts())):
            assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)))


def test_what_stands_after_the_end_changes_nothing() -> None:
    model, ids = tiny_lit(), texts()
    other = ids.clone()
    other[0, 3:] = 5
    with torch.no_grad():
        assert torch.equal(model.encode_text(ids)[0], model.encode_text(other)[0])
        assert torch.allclose(model.encode_text(ids[:1, :3]), model.encode_text(ids)[:1], atol=1e-6)


def test_what_stands_before_the_end_does() -> None:
    model, ids = tiny_lit(), texts()
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % END
    with torch.no_grad():
        assert not torch.allclose(model.encode_text(ids)[0], model.encode_text(other)[0])


def test_the_released_sizes_are_the_defaults() -> None:
    with torch.device("meta"):
        model = AIMv2LiT(LiTConfig(EncoderConfig(**SIZES["aimv2_large"])))
    assert model.text_encoder.preprocessor.text_embedding.weight.shape == (49_408, 768)
    assert model.text_encoder.preprocessor.positional_embedding.shape == (77, 768)
    assert len(model.text_encoder.trunk.blocks) == 12
    assert model.image_encoder.head.num_heads == 8
    # transformers' own count, with the released projection's width
    with torch.device("meta"):
        twin = Aimv2Model(Aimv2Config(text_config={}, vision_config={}, projection_dim=768))
    count = sum(p.numel() for p in twin.parameters())
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2, 3]], "text 0 has no end-of-text token 29"),
        ([[1, END], [1, 2]], "text 1 has no end-of-text token 29"),
        ([[1] * 7 + [END]], r"\(texts, 1 to 7 tokens\), not \(1, 8\)"),
        ([1, END], r"not \(2,\)"),
        ([[]], r"not \(1, 0\)"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(ids: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_lit().encode_text(torch.tensor(ids, dtype=torch.long))


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_both_layouts_come_back_bit_for_bit(tmp_path: Path, first: str, second: str) -> None:
    model = tiny_lit()
    save_lit(model, tmp_path / "a", layout=first)
    save_lit(load_lit(tmp_path / "a"), tmp_path / "b", layout=second)
    loaded = load_lit(tmp_path / "b")
    assert loaded.config == model.config
    assert_same(loaded.state_dict(), model.state_dict())


def test_the_original_names_are_those_of_the_first_release(tmp_path: Path) -> None:
    save_lit(tiny_lit(), tmp_path, layout="original")
    block = ("norm_1", "attn.qkv", "attn.proj", "norm_2", "mlp.fc1", "mlp.fc2", "mlp.fc3")
    assert load_file(tmp_path / "model.safetensors").keys() == {
        "image_encoder.preprocessor.patchifier.proj.weight",
        "image_encoder.preprocessor.patchifier.proj.bias",
        "image_encoder.preprocessor.patchifier.norm.weight",
        "image_encoder.preprocessor.pos_embed",
        "image_encoder.trunk.post_trunk_norm.weight",
        "image_encoder.head.cls_token",
        "image_encoder.head.k.weight",
        "image_encoder.head.v.weight",
        "image_encoder.head.linear.weight",
        "image_encoder.head.linear.bias",
        "text_encoder.preprocessor.text_embedding.weight",
        "text_encoder.preprocessor.positional_embedding",
        "text_encoder.trunk.post_trunk_norm.weight",
        "image_projector.weight",
        "text_projector.weight",
        "log_logit_scale",
        *(
            f"{tower}_encoder.trunk.blocks.{number}.{part}.weight"
            for tower in ("image", "text")
            for number in range(2)
            for part in block
        ),
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["max_context_length"] == 7
    assert config["init_temperature"] == 0.07


def test_a_folder_written_by_transformers_is_read(tmp_path: Path) -> None:
    twin = theirs(tiny_lit(), tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs")
    loaded = load_lit(tmp_path / "theirs")
    assert loaded.config == tiny_lit().config
    assert_same(loaded.state_dict(), tiny_lit().state_dict())


def test_what_a_config_within_a_config_leaves_out_is_transformers_default() -> None:
    plain = Aimv2Config(vision_config={}, text_config={})
    assert {key: getattr(plain.vision_config, key) for key in VISION_DEFAULTS} == VISION_DEFAULTS
    text = {key: getattr(plain.text_config, key) for key in vars(TextConfig())}
    assert TextConfig(**text) == TextConfig()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_a_lit_checkpoint_the_encoder_alone_is_read_and_the_rest_named(
    tmp_path: Path, layout: str
) -> None:
    model = tiny_lit()
    save_lit(model, tmp_path, layout=layout)
    with pytest.warns(UserWarning, match="left aside") as warned:
        encoder = load_encoder(tmp_path)
    said = str(warned[0].message)
    assert said.endswith(
        "its encoder alone is read; left aside: image_encoder.head (5 tensors), image_projector "
        "(1 tensor), log_logit_scale (1 tensor), text_encoder (17 tensors), text_projector "
        "(1 tensor)"
    )
    features = model.image_encoder(pixels())
    assert torch.equal(encoder(pixels()), features)
    assert encoder.config == VISION


def test_a_bfloat16_model_stays_bfloat16(tmp_path: Path) -> None:
    save_lit(tiny_lit().bfloat16(), tmp_path)
    assert {p.dtype for p in load_lit(tmp_path).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("layout", ["original", "transformers", "timm"])
def test_an_encoder_where_a_lit_model_is_wanted_is_refused(tmp_path: Path, layout: str) -> None:
    save_encoder(tiny_encoder(), tmp_path, layout=layout)
    with pytest.raises(UsageError, match="an encoder alone, without a text tower: load_encoder"):
        load_lit(tmp_path)


def change(folder: Path, **changes: Any) -> None:
    """Rewrite config.json; a value of None takes the key out."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "an encoder alone"),
        ({"text_config": 3}, "text_config is 3"),
        ({"text_config": {"hidden_size": 0}}, "hidden_size must be a whole number"),
        ({"text_config": {"num_attention_heads": 7}}, "768 is not divisible by num_attention_"),
        ({"text_config": {"vocab_size": 30}}, "eos_token_id 49407 is not below vocab_size 30"),
        ({"text_config": {"qkv_bias": True}}, "qkv_bias is True"),
        ({"projection_dim": None}, "lacks projection_dim"),
        ({"projection_dim": "wide"}, "projection_dim must be at least 1, not 'wide'"),
        ({"projection_dim": 13}, "visual_projection.weight has shape (12, 16) instead of (13, 16)"),
        ({"max_logit_scale": 0}, "max_logit_scale must be at least 1"),
        ({"vision_config": {"image_size": 57}}, "57 is not a multiple of patch_size 14"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_lit(tiny_lit(), tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(UsageError) as caught:
        load_lit(tmp_path)
    assert message in str(caught.value)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    save_lit(tiny_lit(), tmp_path)
    path = tmp_path / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    state.pop("text_model.encoder.layers.1.attention.v_proj.weight")
    state["logit_bias"] = torch.zeros(())
    state["vision_model.head.cls_token"] = torch.zeros(1, 2, 16)
    save_file(state, path)
    with pytest.raises(UsageError) as caught:
        load_lit(tmp_path)
    message = str(caught.value)
    assert "text_model.encoder.layers.1.attention.v_proj.weight is missing" in message
    assert "logit_bias is left over" in message
    assert "vision_model.head.cls_token has shape (1, 2, 16) instead of (1, 1, 16)" in message
    with pytest.raises(
        UsageError,
        match=r"text_model.encoder.layers.1.attention.k_proj.weight is there, .*is missing",
    ):
        load_encoder(tmp_path)


def test_an_encoder_is_not_read_from_among_tensors_that_no_lit_model_has(tmp_path: Path) -> None:
    save_lit(tiny_lit(), tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "logit_bias": torch.zeros(())}, path)
    with pytest.raises(UsageError, match="logit_bias is not a tensor of AIMv2"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [("timm", "timm has no LiT models"), ("orginal", "did you mean original")],
)
def test_a_layout_that_cannot_be_is_refused(tmp_path: Path, layout: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        save_lit(tiny_lit(), tmp_path / "new", layout=layout)
    assert not (tmp_path / "new").exists()


def test_the_public_names_are_these() -> None:
    assert aimv2_mllm.load_lit is load_lit
    assert aimv2_mllm.AIMv2LiT is AIMv2LiT
