"""A training step without numbers: what it computes, and the memory that it takes on a device.

The model lies on the meta device, where tensors have shapes and no storage, and runs forward and
backward as in training. Whole numbers and truth values (token ids, lengths, masks) are real, since
shapes depend on them. So there are no formulas to keep in step with the models.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from aimv2_mllm import heap
from aimv2_mllm.engine.flops import COSTS, FlopCounter
from aimv2_mllm.engine.strategies import blocks, keep_inputs

if TYPE_CHECKING:
    from aimv2_mllm.engine.training import Objective

INDEXINGS = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)
# Torch's scoring of some tokens at a time, whose own tensors no mode sees: see `_scores`.
SCORING = "torch_nn::_linear_cross_entropy_batch_chunked"
META = torch.device("meta")
CPU = torch.device("cpu")


class _Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, floating numbers on the meta device meet real whole ones from the CPU, and the
    bytes of what is alive on the meta device are counted."""

    def __init__(self, words: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.small = self.logits = self.gradients = 0
        self.peak = (0, 0, 0)  # bytes of everything, of logits and of gradients, at one moment
        self.most_small = 0  # at a moment of its own
        self._words = words
        self._sizes: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The operation, on the meta device if any of its tensors lies there."""
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_meta = any(tensor.is_meta for tensor in given)
        is_placed = not on_meta and kwargs.get("device") is not None
        if is_placed and not _is_floating(given, kwargs):
            # Made from whole numbers, or moved, to the device of a float: it stays real.
            kwargs["device"] = CPU
        if on_meta and any(not tensor.is_meta for tensor in given):
            args, kwargs = tree_map(_as_meta, _with_places(func, args)), tree_map(_as_meta, kwargs)
        result = func(*args, **kwargs)
        inside = _scores(*args) if func.name() == SCORING else None
        for tensor in [*tree_leaves(result), inside]:
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self.note(tensor)
        return result

    def note(self, tensor: Tensor, *, is_gradient: bool = False) -> None:
        """Count what `tensor` holds for as long as it is alive."""
        storage = tensor.untyped_storage()
        sizes = self._sizes.get(storage)
        if sizes is None:
            sizes = self._sizes[storage] = [storage.nbytes(), 0, 0]
            if tensor.ndim and tensor.shape[-1] == self._words:
                sizes[1] = sizes[0]
            self._add(sizes, 1)
            weakref.finalize(storage, self._add, sizes, -1)
        if is_gradient and not sizes[2]:
            sizes[2] = sizes[0]
            self.gradients += sizes[2]
        self.peak = max(self.peak, (self.alive, self.logits, self.gradients))
        self.most_small = max(self.most_small, self.small)

    def _add(self, sizes: list[int], sign: int) -> None:
        self.alive += sign * sizes[0]
        self.small += sign * sizes[0] * (sizes[0] < heap.MAPPED)
        self.logits += sign * sizes[1]
        self.gradients += sign * sizes[2]


def _scores(hidden: Tensor, weight: Tensor, *words: Any) -> Tensor:
    """What SCORING holds while it computes: the scores of a chunk of tokens."""
    chunk = words[6]
    return torch.empty(min(chunk, len(hidden)), len(weight), dtype=torch.float32, device=META)


def _is_floating(given: list[Tensor], kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return bool(dtype.is_floating_point)
    return any(tensor.is_floating_point() for tensor in given)


def _as_meta(value: Any) -> Any:
    return value.to(META) if isinstance(value, Tensor) and not value.is_meta else value


def _with_places(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`args`, with real masks of an indexing as the places that they choose."""
    if func not in INDEXINGS:
        return args
    places: list[Any] = []
    for index in args[1]:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta
        places += index.nonzero(as_tuple=True) if is_mask else [index]
    return (args[0], places, *args[2:])


class _Kernels(TorchFunctionMode):
    """While entered, attention keeps what the fused kernels keep, and products are in bfloat16 if
    `half`: the meta device has neither fused attention nor autocast of its own."""

    def __init__(self, half: bool, *, keeps_casts: bool) -> None:
        super().__init__()
        self._half, self._keeps_casts = half, keeps_casts
        self._casts: dict[int, Tensor] = {}  # of weights, each once, as autocast has it

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The operation as a device would compute it."""
        kwargs = dict(kwargs or {})
        if self._half and func in COSTS:
            args, kwargs = tree_map(self._cast, args), tree_map(self._cast, kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or not value.is_meta:
            return value
        if not (self._keeps_casts and value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(torch.bfloat16)
        return self._casts[id(value)]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled-dot-product attention by a fused kernel, which keeps no attention weights."""
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # As torch hands it to its kernels: 0 and -inf.
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=META)
    mixed: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return mixed


@dataclass(frozen=True)
class Footprint:
    """What one micro-batch costs: bytes at the moment when most are held, weights and optimiser
    aside, and operations forward and backward."""

    activations: int
    logits: int  # of these, scores of words and what is computed from them
    gradients: int
    flops: int
    small: int  # in tensors of less than heap.MAPPED bytes, gradients too, when these hold most


def rehearse(
    model: nn.Module,
    objective: Objective,
    batch: Mapping[str, Any],
    *,
    half: bool,
    checkpointing: bool,
    words: int,
    gradients_before: bool,
) -> Footprint:
    """What forward and backward of `batch`, on the CPU, take of `model`, on the meta device.

    `half`: products in bfloat16, as under autocast. `words`: how many the model tells apart, for
    its logits. `gradients_before`: memory for gradients is there from the beginning, as it is after
    the first of several micro-batches.
    """
    if checkpointing:
        # Not a mode around backward, which leaves all modes; nor counted, for it is done twice.
        keep_inputs(model, lambda: (nullcontext(), _Kernels(half, keeps_casts=False)))
    dtype = next(model.parameters()).dtype
    batch = {name: _floats_on_meta(value, dtype) for name, value in batch.items()}
    totals = objective.targets(batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counter, shapes = FlopCounter(), _Shapes(words)
    hooks = []
    try:
        for parameter in model.parameters():
            shapes.note(parameter)
        weights, small = shapes.alive, shapes.small
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter) if gradients_before else None
            if parameter.grad is not None:
                shapes.note(parameter.grad, is_gradient=True)
            hooks.append(
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda p: shapes.note(p.grad, is_gradient=True)
                )
            )
        for tensor in tree_leaves(batch):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                shapes.note(tensor)
        with shapes:
            with _Kernels(half, keeps_casts=True), counter:
                total = objective(model, batch, totals).total
            torch.autograd.backward(total)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
        for block in blocks(model) if checkpointing else ():
            del block.forward
    alive, logits, gradients = shapes.peak
    most_small = shapes.most_small - small
    return Footprint(alive - weights - gradients, logits, gradients, counter.flops, most_small)


def _floats_on_meta(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_floats_on_meta(one, dtype) for one in value]
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(META, dtype) if is_floating else value
