"""The names of AIMv2's tensors: tables against the spec and transformers, and renaming bit for bit.

timm cannot be installed beside the CPU torch, so its names stand here as the spec has them.
"""

import pytest
import torch
from torch import Tensor
from transformers import Aimv2VisionConfig, Aimv2VisionModel

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.layouts import transformers_config
from aimv2_mllm.model.namings import (
    LIT_NAMINGS,
    NAMINGS,
    naming_of,
    rename,
    rename_lit,
    restore,
    restore_lit,
)

LAYOUTS = ("original", "transformers", "timm")


def tiny_encoder(native: bool = False) -> AIMv2Encoder:
    torch.manual_seed(0)
    encoder = AIMv2Encoder(EncoderConfig(16, 24, 2, 2, image_size=56, native=native))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
    return encoder


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_timm_names_and_shapes_are_those_of_the_spec() -> None:
    state = rename(tiny_encoder().state_dict(), NAMINGS["timm"])
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "patch_embed.proj.weight": (16, 3, 14, 14),
        "patch_embed.proj.bias": (16,),
        "patch_embed.norm.weight": (16,),
        "pos_embed": (1, 16, 16),
        "blocks.0.norm1.weight": (16,),
        "blocks.0.attn.qkv.weight": (48, 16),
        "blocks.0.attn.proj.weight": (16, 16),
        "blocks.0.norm2.weight": (16,),
        "blocks.0.mlp.fc1_g.weight": (24, 16),
        "blocks.0.mlp.fc1_x.weight": (24, 16),
        "blocks.0.mlp.fc2.weight": (16, 24),
        "blocks.1.norm1.weight": (16,),
        "blocks.1.attn.qkv.weight": (48, 16),
        "blocks.1.attn.proj.weight": (16, 16),
        "blocks.1.norm2.weight": (16,),
        "blocks.1.mlp.fc1_g.weight": (24, 16),
        "blocks.1.mlp.fc1_x.weight": (24, 16),
        "blocks.1.mlp.fc2.weight": (16, 24),
        "norm.weight": (16,),
    }


def test_in_timm_g_is_the_gate_and_x_goes_up() -> None:
    """As transformers' names say it: the two namings must agree on which matrix is which."""
    state = tiny_encoder().state_dict()
    timm, theirs = rename(state, NAMINGS["timm"]), rename(state, NAMINGS["transformers"])
    for ours, word in (("fc1_g", "gate"), ("fc1_x", "up"), ("fc2", "down")):
        expected = theirs[f"encoder.layers.1.ffn.{word}_proj.weight"]
        assert torch.equal(timm[f"blocks.1.mlp.{ours}.weight"], expected)


@pytest.mark.parametrize("native", [False, True])
def test_transformers_loads_the_renamed_tensors_strictly(native: bool) -> None:
    encoder = tiny_encoder(native)
    model = Aimv2VisionModel(Aimv2VisionConfig(**transformers_config(encoder.config)))
    renamed = rename(encoder.state_dict(), NAMINGS["transformers"])
    model.load_state_dict(renamed, strict=True)
    assert_same(restore(model.state_dict(), NAMINGS["transformers"]), encoder.state_dict())


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_renaming_there_and_back_changes_nothing(layout: str, native: bool) -> None:
    state = tiny_encoder(native).state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    assert_same(restore(rename(state, NAMINGS[layout]), NAMINGS[layout]), before)
    assert_same(state, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_name_is_lost_or_used_twice(layout: str) -> None:
    state = tiny_encoder().state_dict()
    extra = 2 * 2 if layout == "transformers" else 0  # q, k, v for one, in two blocks
    assert len(rename(state, NAMINGS[layout])) == len(state) + extra


def test_the_queries_keys_and_values_are_split_in_that_order() -> None:
    state = {"trunk.blocks.11.attn.qkv.weight": torch.arange(12.0).view(6, 2)}
    split = rename(state, NAMINGS["transformers"])
    layer = "encoder.layers.11.attention"
    assert {name: tensor[0, 0].item() for name, tensor in split.items()} == {
        f"{layer}.q_proj.weight": 0,
        f"{layer}.k_proj.weight": 4,
        f"{layer}.v_proj.weight": 8,
    }


def test_names_of_something_else_are_refused_in_both_directions() -> None:
    with pytest.raises(UsageError, match=r"trunk.blocks.0.attn.q_norm.weight is not a tensor"):
        rename({"trunk.blocks.0.attn.q_norm.weight": torch.zeros(1)}, NAMINGS["timm"])
    for layout in LAYOUTS:
        with pytest.raises(UsageError, match=f"head.weight is not a tensor of AIMv2 in {layout}"):
            restore({"head.weight": torch.zeros(1)}, NAMINGS[layout])
    name = "encoder.layers.0.attention.k_proj.weight"
    with pytest.raises(UsageError, match=r"q_proj.weight, .*v_proj.weight is missing"):
        restore({name: torch.zeros(1, 1)}, NAMINGS["transformers"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_naming_is_told_by_the_first_block(layout: str) -> None:
    assert naming_of(rename(tiny_encoder().state_dict(), NAMINGS[layout])) == (layout, "")


@pytest.mark.parametrize(
    ("layout", "prefix"), [("original", "image_encoder."), ("transformers", "vision_model.")]
)
def test_the_naming_of_a_lit_checkpoint_is_told_with_its_prefix(layout: str, prefix: str) -> None:
    state = {f"image_encoder.{n}": tensor for n, tensor in tiny_encoder().state_dict().items()}
    renamed = rename_lit(state, layout)
    assert naming_of(renamed) == (layout, prefix)
    assert all(name.startswith(prefix) for name in renamed)
    assert_same(restore_lit(renamed, layout), state)


def test_names_that_no_naming_has_are_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"its tensors are a, b, c ….*trunk.blocks.0 \(original\)"):
        naming_of(["a", "b", "c", "d"])
    with pytest.raises(UsageError, match="it has no tensors"):
        naming_of([])


def test_a_lit_tensor_under_no_known_prefix_is_refused() -> None:
    for layout in LIT_NAMINGS:
        with pytest.raises(UsageError, match="logit_bias is not a tensor"):
            restore_lit({"logit_bias": torch.zeros(1)}, layout)
