"""The linear layers of a frozen LLM in 4 or 8 bits, by bitsandbytes, on any device.

Owns which layers those are: all inside the LLM's body, and neither its head nor anything of tower
and connector. What is quantised cannot be trained, only what is added to it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import UsageError

OUTLIERS = 6.0  # activations beyond are multiplied in 16 bits; source: LLM.int8(), arXiv 2208.07339
INSTALL = "pip install 'aimv2-mllm[qlora]'"


def require_bitsandbytes(form: str) -> Any:
    """The library that quantises to `form`; UsageError where it is not installed."""
    try:
        import bitsandbytes
    except ImportError:
        raise UsageError(f"quantise is {form}, which needs bitsandbytes: {INSTALL}") from None
    return bitsandbytes


def quantise(model: nn.Module, form: str) -> None:
    """Put every linear layer inside `model` into `form`, nf4 or int8, in place and on the device
    where it lies; UsageError without the library, or for a model without such layers."""
    library = require_bitsandbytes(form)
    layers = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]
    if not layers:
        raise UsageError(f"quantise is {form}, and the LLM has no linear layers of torch's own")
    for name, layer in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, FORMS[form](library, layer))


def _nf4(library: Any, layer: nn.Linear) -> Any:
    """`layer` in nf4 with doubly quantised scales, 4.13 bits a weight (arXiv 2305.14314)."""
    shape, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
    made = library.nn.Linear4bit(*shape, bias=has_bias, quant_type="nf4", device="meta")
    data, state = library.functional.quantize_4bit(
        layer.weight.data.contiguous(), compress_statistics=True, quant_type="nf4"
    )
    made.weight = library.nn.Params4bit(
        data, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True
    )
    made.bias = layer.bias
    return made


def _int8(library: Any, layer: nn.Linear) -> Any:
    """`layer` in 8 bits with a scale for each row."""
    shape, has_bias = (layer.in_features, layer.out_features), layer.bias is not None
    # How many outliers there are is no shape.
    most = 0.0 if layer.weight.is_meta else OUTLIERS
    made = library.nn.Linear8bitLt(
        *shape, bias=has_bias, has_fp16_weights=False, threshold=most, device="meta"
    )
    rows, scales, _ = library.functional.int8_vectorwise_quant(layer.weight.data.half())
    made.weight = library.nn.Int8Params(
        rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales
    )
    made.bias = layer.bias
    return made


FORMS: dict[str, Callable[[Any, nn.Linear], Any]] = {"nf4": _nf4, "int8": _int8}


def is_quantised(parameter: torch.Tensor) -> bool:
    """Whether `parameter` is one of those that `quantise` makes."""
    return type(parameter).__name__ in ("Params4bit", "Int8Params")


def num_bytes(parameter: torch.Tensor) -> int:
    """The bytes that `parameter` takes, with its scales where it is quantised."""
    state, rows = getattr(parameter, "quant_state", None), getattr(parameter, "SCB", None)
    scales = [rows]
    while state is not None:  # those of nf4 are quantised themselves
        scales, state = [*scales, state.absmax], state.state2
    return sum(int(t.nbytes) for t in (parameter, *scales) if t is not None)


def num_weights(parameter: torch.Tensor) -> int:
    """How many weights `parameter` stands for, of which several may lie in one number."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())
