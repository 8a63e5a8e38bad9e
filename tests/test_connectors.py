"""Connectors: their number of tokens on any grid, what each computes, what each refuses."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.connectors import CONNECTORS, Linear, Mlp, build_connector
from aimv2_mllm.model.grids import to_planes, to_tokens
from aimv2_mllm.model.projectors import LAYERS, rename_projector
from aimv2_mllm.recipe.connectors import CONNECTOR_SECTIONS

D, E = 8, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {"depth": 3},
    "pixel_shuffle": {"factor": 2},
    "average_pool": {"target": [2, 3]},
    "resampler": {"num_queries": 5, "num_heads": 4},
    "c_abstractor": {"target": 2, "depth": 2, "width": 12},
}


def features(rows: int, columns: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, rows * columns, D, generator=torch.Generator().manual_seed(0))


def parameters(connector: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in connector.state_dict().items()}


@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (6, 4), (2, 8), (8, 10)])
@pytest.mark.parametrize("name", CONNECTORS)
def test_a_connector_makes_as_many_tokens_as_it_says(name: str, grid: tuple[int, int]) -> None:
    connector = build_connector(name, D, E, **OPTIONS[name])
    if name == "average_pool" and grid[1] < 3:
        pytest.skip("this target has three columns")
    embedded = connector(features(*grid), grid)
    assert embedded.shape == (2, connector.num_tokens(grid), E)
    out = connector.out_grid(grid)
    assert out is None or out[0] * out[1] == embedded.shape[1]
    assert (connector.in_features, connector.out_features) == (D, E)


@pytest.mark.parametrize("name", CONNECTORS)
def test_every_parameter_of_a_connector_gets_a_gradient(name: str) -> None:
    connector = build_connector(name, D, E, **OPTIONS[name])
    (connector(features(4, 6), (4, 6)) ** 2).sum().backward()
    still = [n for n, p in connector.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_picture_is_connected_alike_alone_and_in_a_batch(name: str) -> None:
    connector = build_connector(name, D, E, **OPTIONS[name])
    batch = features(4, 6)
    alone = torch.cat([connector(row[None], (4, 6)) for row in batch])
    torch.testing.assert_close(connector(batch, (4, 6)), alone)


@pytest.mark.parametrize("name", CONNECTORS)
def test_features_that_do_not_lie_in_one_piece_give_the_same(name: str) -> None:
    connector = build_connector(name, D, E, **OPTIONS[name])
    straight = features(4, 4)
    scattered = straight.transpose(1, 2).contiguous().transpose(1, 2)
    assert not scattered.is_contiguous()
    torch.testing.assert_close(connector(scattered), connector(straight))


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_connector_computes_in_bfloat16(name: str) -> None:
    connector = build_connector(name, D, E, **OPTIONS[name]).to(torch.bfloat16)
    assert connector(features(4, 4).to(torch.bfloat16)).dtype is torch.bfloat16


def test_linear_is_one_layer_under_the_names_of_llava() -> None:
    connector = build_connector("linear", D, E)
    assert isinstance(connector, Linear)
    assert list(connector.state_dict()) == ["weight", "bias"]
    x = features(2, 3)
    torch.testing.assert_close(connector(x), F.linear(x, connector.weight, connector.bias))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_mlp_equals_the_sequence_of_llavas_mlp_gelu(depth: int) -> None:
    layers: list[nn.Module] = [nn.Linear(D, E)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(E, E)]
    llava = nn.Sequential(*layers)
    connector = build_connector("mlp", D, E, depth=depth)
    connector.load_state_dict(llava.state_dict(), strict=True)
    torch.testing.assert_close(connector(features(2, 3)), llava(features(2, 3)))


def test_an_mlp_serves_patches_whose_grid_nobody_knows() -> None:
    assert build_connector("mlp", D, E)(features(1, 7)).shape == (2, 7, E)


def test_mlp_is_interchangeable_with_the_projector_of_transformers() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=D, num_attention_heads=2),
        text_config=LlamaConfig(hidden_size=E, num_attention_heads=2, vocab_size=100),
    )
    theirs = LlavaMultiModalProjector(config)
    prefix = "multi_modal_projector."
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    connector = build_connector("mlp", D, E)
    connector.load_state_dict(rename_projector(state, "plain"), strict=True)
    torch.testing.assert_close(connector(features(2, 3)), theirs(features(2, 3)))
    assert rename_projector(connector.state_dict(), "transformers").keys() == state.keys()


@pytest.mark.parametrize("naming", LAYERS)
def test_a_projector_survives_the_way_to_another_naming_and_back(naming: str) -> None:
    state = build_connector("mlp", D, E).state_dict()
    there = rename_projector(state, naming)
    back = rename_projector(there, "plain")
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_llavas_projector_is_read_under_any_prefix() -> None:
    state = build_connector("mlp", D, E).state_dict()
    for prefix in ("model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."):
        named = {prefix + name: tensor for name, tensor in state.items()}
        read = rename_projector(named, "plain")
        assert torch.equal(read["2.bias"], state["2.bias"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.mm_projector.4.weight": torch.ones(E, E)}, "mm_projector.4.weight is no tensor"),
        ({"model.mm_projector.2.bias": torch.ones(E + 1)}, r"2.bias has shape \(17,\)"),
        ({"model.mm_projector.2.bias": None}, "2.bias is missing"),
        ({"model.mm_projector.0.weight": None}, "first layer's weight"),
    ],
)
def test_what_is_no_mlp_of_two_layers_is_refused(change: dict[str, Any], says: str) -> None:
    state = rename_projector(build_connector("mlp", D, E).state_dict(), "llava") | change
    with pytest.raises(UsageError, match=says):
        rename_projector({n: tensor for n, tensor in state.items() if tensor is not None}, "plain")


def test_pixel_shuffle_reads_the_patches_of_a_square_in_raster_order() -> None:
    connector = build_connector("pixel_shuffle", 1, 4, factor=2, depth=1)
    with torch.no_grad():
        connector.mlp[0].weight.copy_(torch.eye(4))
        connector.mlp[0].bias.zero_()
    numbers = torch.arange(24.0).view(1, 24, 1)  # 4 rows of 6: patch (r, c) is 6 r + c
    assert connector(numbers, (4, 6))[0].tolist() == [
        [0, 1, 6, 7],
        [2, 3, 8, 9],
        [4, 5, 10, 11],
        [12, 13, 18, 19],
        [14, 15, 20, 21],
        [16, 17, 22, 23],
    ]


def test_average_pool_means_neighbours_of_the_grid() -> None:
    for options in ({"factor": 2}, {"target": (2, 3)}):
        connector = build_connector("average_pool", 1, 1, depth=1, **options)
        with torch.no_grad():
            connector.mlp[0].weight.fill_(1)
            connector.mlp[0].bias.zero_()
        numbers = torch.arange(24.0).view(1, 24, 1)
        assert connector(numbers, (4, 6)).flatten().tolist() == [3.5, 5.5, 7.5, 15.5, 17.5, 19.5]


def test_the_resampler_knows_where_a_patch_lies() -> None:
    torch.manual_seed(0)
    connector = build_connector("resampler", D, E, num_queries=3, num_heads=4)
    x = features(4, 6)
    elsewhere = connector(x.flip(1), (4, 6))
    assert (connector(x, (4, 6)) - elsewhere).abs().max() > 1e-3
    assert (connector(x, (4, 6)) - connector(x, (6, 4))).abs().max() > 1e-3


def test_the_resampler_equals_attention_written_out() -> None:
    torch.manual_seed(0)
    connector = build_connector("resampler", D, E, num_queries=3, num_heads=1)
    state, x = parameters(connector), features(2, 3)
    values = F.layer_norm(
        x @ state["patches.weight"].T,
        (E,),
        state["norm_patches.weight"],
        state["norm_patches.bias"],
    )
    angles = 10000.0 ** -(torch.arange(E // 4) / (E // 4))
    row, column = torch.tensor([0, 0, 0, 1, 1, 1.0]), torch.tensor([0, 1, 2, 0, 1, 2.0])
    across, down = column[:, None] * angles, row[:, None] * angles
    places = torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], 1)
    query = F.layer_norm(
        state["queries"], (E,), state["norm_queries.weight"], state["norm_queries.bias"]
    )
    wq, wk, wv = state["attention.in_proj_weight"].chunk(3)
    bq, bk, bv = state["attention.in_proj_bias"].chunk(3)
    scores = (query @ wq.T + bq) @ ((values + places) @ wk.T + bk).transpose(1, 2) / E**0.5
    mixed = scores.softmax(-1) @ (values @ wv.T + bv)
    mixed = mixed @ state["attention.out_proj.weight"].T + state["attention.out_proj.bias"]
    mixed = F.layer_norm(mixed, (E,), state["norm_out.weight"], state["norm_out.bias"])
    expected = mixed @ state["proj.weight"].T + state["proj.bias"]
    torch.testing.assert_close(connector(x, (2, 3)), expected)


def test_the_c_abstractor_pools_between_its_blocks() -> None:
    torch.manual_seed(0)
    connector = build_connector("c_abstractor", D, E, target=2, depth=1)
    x = features(4, 6)
    planes = connector.before(to_planes(x, (4, 6)))
    assert planes.shape == (2, D, 4, 6)
    means = planes.view(2, D, 2, 2, 2, 3).mean((3, 5))
    expected = connector.mlp(to_tokens(connector.after(means)))
    torch.testing.assert_close(connector(x, (4, 6)), expected)


def test_planes_hold_the_patches_in_raster_order() -> None:
    planes = to_planes(torch.arange(6.0).view(1, 6, 1), (2, 3))
    assert planes[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert to_tokens(planes).flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "options", "grid", "says"),
    [
        ("pixel_shuffle", {"factor": 4}, (16, 18), "multiples of 4, not 16 x 18.* are 1, 2$"),
        ("average_pool", {"factor": 3}, (16, 16), "multiples of 3, not 16 x 16.* 1, 2, 4, 8, 16$"),
        ("average_pool", {"target": 5}, (4, 8), "at least .* not 4 x 8: give a smaller target"),
        ("c_abstractor", {"target": [3, 9]}, (8, 8), "target 3 x 9 .* not 8 x 8"),
    ],
)
def test_a_grid_that_cannot_be_served_is_refused_with_those_that_can(
    name: str, options: dict[str, Any], grid: tuple[int, int], says: str
) -> None:
    connector = build_connector(name, D, E, **options)
    with pytest.raises(UsageError, match=says):
        connector.num_tokens(grid)
    with pytest.raises(UsageError, match=says):
        connector(features(*grid), grid)


@pytest.mark.parametrize("name", ["pixel_shuffle", "average_pool", "resampler", "c_abstractor"])
def test_patches_that_are_not_the_grid_are_refused(name: str) -> None:
    connector = build_connector(name, D, E, **OPTIONS[name])
    with pytest.raises(UsageError, match="24 patches are no square grid: give its rows"):
        connector(features(4, 6))
    with pytest.raises(UsageError, match="24 patches are no grid of 4 x 4"):
        connector(features(4, 6), (4, 4))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("mpl", {}, "connector is 'mpl', and must be one of linear, .*did you mean mlp"),
        ("linear", {"depth": 2}, "linear has no option 'depth'; it takes no options"),
        ("pixel_shuffle", {"facter": 2}, "'facter'; it takes factor, depth; did you mean factor"),
        ("mlp", {"depth": 0}, "depth must be a whole number of at least 1, not 0"),
        ("mlp", {"depth": True}, "not true"),
        ("average_pool", {}, "needs either factor or target"),
        ("average_pool", {"factor": 2, "target": 3}, "needs either factor or target"),
        ("average_pool", {"target": [1, 2, 3]}, "one or two whole numbers"),
        ("average_pool", {"target": "8"}, 'not "8"'),
        ("resampler", {"num_heads": 3}, "divisible by 4 and by num_heads, which is 3"),
        ("c_abstractor", {"depth": 0}, "depth must be"),
    ],
)
def test_an_impossible_connector_is_refused(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build_connector(name, D, E, **options)


def test_the_mlp_is_the_default_of_llava() -> None:
    connector = build_connector("mlp", D, E)
    assert isinstance(connector, Mlp)
    assert list(connector.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_recipes_may_say_just_what_the_connectors_take() -> None:
    assert CONNECTOR_SECTIONS.keys() == CONNECTORS.keys()
    for name, section in CONNECTOR_SECTIONS.items():
        taken = [*inspect.signature(CONNECTORS[name]).parameters.values()][2:]
        said = {key: field for key, field in section.model_fields.items() if key != "name"}
        assert list(said) == [parameter.name for parameter in taken]
        for parameter in taken:
            default = said[parameter.name].default
            assert default == parameter.default or default == [parameter.default] * 2
