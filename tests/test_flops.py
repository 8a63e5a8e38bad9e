"""The arithmetic of a step: counted as the formulas of the layers have it."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2_mllm.engine.flops import PEAKS, FlopCounter, peak
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.packed import Packing
from aimv2_mllm.model.rows import Rows


def counted(module: nn.Module, *inputs: Tensor) -> int:
    with FlopCounter() as counter:
        module(*inputs)
    return counter.flops


def test_a_layer_costs_one_product_forward_and_one_more_for_each_gradient() -> None:
    layer, x = nn.Linear(3, 5), torch.randn(7, 3)
    product = 2 * 7 * 3 * 5
    assert counted(layer, x) == 2 * product  # of the weight
    assert counted(layer, x.requires_grad_()) == 3 * product
    assert counted(layer.requires_grad_(False), x) == 2 * product  # of the input
    assert counted(layer, x.detach()) == product


def test_an_encoder_costs_what_its_numbers_say() -> None:
    depth, width, hidden, patches, batch = 3, 16, 24, 4, 2
    config = EncoderConfig(width, hidden, depth, 2, image_size=28)
    encoder = AIMv2Encoder(config)
    pixels = torch.randn(batch, 3, 28, 28)
    weights = depth * (4 * width * width + 3 * width * hidden)
    blocks = 3 * (2 * batch * patches * weights + depth * 4 * batch * patches**2 * width)
    patchifier = 2 * 2 * batch * patches * 588 * width  # pixels have no gradient
    assert counted(encoder, pixels) == blocks + patchifier


def test_products_written_in_any_way_are_counted() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    ways = (torch.matmul, torch.bmm, Tensor.matmul, lambda a, b: a @ b)
    for way in ways:
        with FlopCounter() as counter:
            way(a, b)
        assert counter.flops == 2 * 2 * 3 * 4 * 5
    with FlopCounter() as counter:
        F.linear(weight=torch.randn(5, 4), input=a)
    assert counter.flops == 2 * 2 * 3 * 4 * 5


def test_attention_of_many_lengths_costs_what_that_of_each_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = ModuleType("torch.nn.attention.varlen")  # the real one runs on CUDA only
    kernel.varlen_attn = lambda query, *_, **__: query + 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    lengths, heads, width = [2, 3, 4], 4, 8
    query, key = (torch.randn(9, n, width, requires_grad=n == heads) for n in (heads, 2))
    rows = Rows(lengths, torch.device("cpu"))
    with FlopCounter() as counter:
        rows._by_variable_lengths(query, key, key, None, None)
    assert counter.flops == 2 * 4 * heads * width * (2 * 2 + 3 * 3 + 4 * 4)
    qkv, prefixes = torch.randn(9, 3, heads, width), [1, 2, 2]
    with FlopCounter() as counter:
        Packing(lengths, prefixes).attend_by_variable_lengths(qkv)
    assert counter.flops == 4 * heads * width * (1 + 1 * 2 + 2 * 2 + 1 * 3 + 2 * 2 + 2 * 4)


def test_what_is_computed_is_the_same_under_the_counter() -> None:
    encoder = AIMv2Encoder(EncoderConfig(16, 24, 2, 2, image_size=28))
    pixels = torch.randn(2, 3, 28, 28)
    plain = encoder(pixels)
    with FlopCounter():
        assert torch.equal(encoder(pixels), plain)


def test_the_peak_of_an_unknown_device_is_measured_once() -> None:
    first = peak(torch.device("cpu"), "fp32")
    assert first > 1e8
    assert peak(torch.device("cpu"), "fp32") == first
    assert PEAKS["NVIDIA H200"] == 989e12
