"""The arithmetic of a step, counted from its matrix products, and what a device could do at most.

Together they give the share of a device's speed that a run uses (model FLOPs utilisation, as in
arXiv 2204.02311, appendix B): two operations per multiplication and addition, causal attention
counted whole, nothing for what activation checkpointing computes twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from aimv2_mllm.engine.precision import has_bf16

# Dense bf16 operations per second, by the name that torch gives the device. Source: NVIDIA's data
# sheets (those with sparsity halved).
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    # With float32 sums (whitepapers of Ada and GA102).
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}
LONG_ENOUGH = 0.02  # seconds


def peak(device: torch.device, precision: str) -> float:
    """Operations per second that `device` reaches at most: of `PEAKS`, else measured once."""
    if device.type == "cuda" and precision == "bf16":
        known = PEAKS.get(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    half = precision == "bf16" and has_bf16(device)
    return _measured(device, torch.bfloat16 if half else torch.float32)


@lru_cache
def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The best of square products, each twice as wide, until one takes long enough to be timed."""
    best, side, seconds = 0.0, 128, 0.0
    while seconds < LONG_ENOUGH and side <= 16384:
        square = torch.ones(side, side, device=device, dtype=dtype)
        (square @ square)[0, 0].item()  # warms up
        start = time.perf_counter()
        (square @ square)[0, 0].item()
        seconds = time.perf_counter() - start
        best = max(best, 2 * side**3 / seconds)
        side *= 2
    return best


class FlopCounter(TorchFunctionMode):
    """While entered, adds up in `flops` what is computed forward and, later, backward.

    It sees linear layers, quantised too, convolutions, products of matrices and attention, also of
    samples of many lengths; other kernels count nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The operation as it is, counted."""
        result = func(*args, **(kwargs or {}))
        cost, name = COSTS.get(func), getattr(func, "__name__", None)
        if cost is not None:
            factors = [*args, *(kwargs or {}).values()]
            first, second = [factor for factor in factors if isinstance(factor, Tensor)][:2]
            # Backward: one more such product for each factor that has a gradient.
            times = 1 + first.requires_grad + second.requires_grad
            self.flops += times * cost(result, first, second)
        elif name == BY_LENGTHS:
            query, key, _, own, seen = args
            # Two products in each sample, of (L, d) by (d, keys) numbers per head.
            pairs = sum(a * b for a, b in zip(own.lengths, seen.lengths, strict=True))
            times = 1 + query.requires_grad + key.requires_grad
            self.flops += times * 4 * query.shape[-2:].numel() * pairs
        elif name in QUANTISED:
            product = result[0] if isinstance(result, tuple) else result
            # Such a weight has no gradient, and what it is multiplied with has one.
            self.flops += 2 * _product(product, args[0], args[1])
        return result


def _product(result: Tensor, first: Tensor, second: Tensor) -> int:
    return 2 * result.numel() * first.shape[-1]


def _convolution(result: Tensor, first: Tensor, second: Tensor) -> int:
    return 2 * result.numel() * second[0].numel()


def _attention(result: Tensor, query: Tensor, key: Tensor) -> int:
    # Two products, each of (L, d) by (d, keys) numbers per head.
    return 4 * result.numel() * key.shape[-2]


BY_LENGTHS = "attend_by_lengths"  # of model.packed
# bitsandbytes' products with quantised weights.
QUANTISED = ("gemm_4bit.default", "int8_scaled_mm.default", "int8_mixed_scaled_mm.default")
COSTS: dict[Callable[..., Any], Callable[[Tensor, Tensor, Tensor], int]] = {
    F.linear: _product,
    F.conv2d: _convolution,
    F.scaled_dot_product_attention: _attention,
    torch.matmul: _product,
    torch.bmm: _product,
    Tensor.matmul: _product,
    Tensor.__matmul__: _product,
}
