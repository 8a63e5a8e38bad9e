"""Where a model is trained: on one device, copied to every rank, or sharded over all of them.

Owns what device, DDP, FSDP2, activation checkpointing and compilation do to a model. None of them
changes what is computed beyond rounding: a rank has its share of a step's samples, losses are sums
over the step's totals, and so the gradients of ranks are added.

With `precision: bf16` the weights that the optimiser sees are float32 everywhere; ddp and single
compute under autocast, fsdp2 gathers the weights as bfloat16 and adds gradients in float32, so that
the two differ by the rounding of bfloat16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from aimv2_mllm.engine.distributed import Ranks
from aimv2_mllm.engine.precision import has_bf16

if TYPE_CHECKING:
    from aimv2_mllm.recipe.train import TrainConfig


Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
MOST_VARIANTS = 64  # of compiled code; beyond it torch runs it uncompiled


@dataclass(frozen=True)
class Placed:
    """A model where it is trained."""

    module: nn.Module  # owns the parameters, under the model's own names
    call: nn.Module  # what the objective calls
    device: torch.device
    precision: str  # of forward and loss, see `precision.autocast`
    hold_back: Callable[[], AbstractContextManager[None]]  # no exchange of gradients inside


def place(model: nn.Module, config: TrainConfig, ranks: Ranks) -> Placed:
    """`model` where and how `config` says; `give_back` ends it."""
    name = "ddp" if config.strategy == "auto" else config.strategy
    return STRATEGIES[name if ranks.size > 1 else "single"](model, config, ranks)


def single(model: nn.Module, config: TrainConfig, ranks: Ranks) -> Placed:
    """The model itself on one device."""
    device = ranks.device(config.device)
    _lighten(model.to(device), config)
    return Placed(model, model, device, config.precision, nullcontext)


def ddp(model: nn.Module, config: TrainConfig, ranks: Ranks) -> Placed:
    """The model itself, equal on every rank; gradients are added while backward runs."""
    device = ranks.device(config.device)
    _lighten(model.to(device), config)
    call = DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    call.register_comm_hook(None, lambda state, bucket: _added(bucket))  # in place of DDP's mean
    return Placed(model, call, device, config.precision, call.no_sync)


def _added(bucket: Any) -> Any:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def fsdp2(model: nn.Module, config: TrainConfig, ranks: Ranks) -> Placed:
    """A copy of the model of which every rank has some rows of each parameter, as it is on rank 0;
    the model of the others may be on the meta device.

    What is quantised is whole on every rank, and its own. The model itself, which must not change
    its class as what is sharded does, keeps the shapes of the rest alone, until rank 0 is given it
    back: as many whole models as ranks would lie in the memory of the machine.
    """
    device = ranks.device(config.device)
    # The copy takes over the memory, so that there are never two models. What is quantised is of a
    # class of its own, with its scales beside it, and stays itself.
    kept = {p for p in model.parameters() if type(p) is not nn.Parameter}
    taken: dict[int, Any] = {
        id(p): p if p in kept else nn.Parameter(p.detach(), p.requires_grad)
        for p in model.parameters()
    }
    module: Any = copy.deepcopy(model, taken)
    del taken  # else nothing would be freed when it is sharded
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            parameter.data = parameter.new_empty(()).expand(parameter.shape)
    for owner in [m for m in module.modules() if kept.intersection(m.parameters(recurse=False))]:
        owner.to(device)
    kept = {p for p in module.parameters() if type(p) is not nn.Parameter}
    _lighten(module, config)
    mesh = init_device_mesh(device.type, (ranks.size,))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if config.precision == "bf16" and has_bf16(device) else MixedPrecisionPolicy()
    for part in (*blocks(module), module):
        share_out(part, ranks, device)
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=kept)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # In place of the mean; without `force` it asks for an operation that gloo has not.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)

    @contextmanager
    def hold_back() -> Iterator[None]:
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)

    return Placed(module, module, device, "fp32", hold_back)


def share_out(module: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Put the parameters and buffers of `module` that are neither sharded nor quantised onto
    `device`, on every rank those of rank 0."""
    own = {n: t for n, t in _tensors(module) if type(t) in (Tensor, nn.Parameter)}
    kinds = ranks.gather({name: (tensor.shape, tensor.dtype) for name, tensor in own.items()})[0]
    assert list(kinds) == list(own), f"not the same on rank 0: {kinds.keys() ^ own.keys()}"
    for name, tensor in own.items():
        if ranks.is_first:
            there = tensor.detach().to(device).contiguous()
        else:
            shape, dtype = kinds[name]
            there = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(there, src=0)
        # Another object, for the group may hold the one that was sent a moment longer.
        new = there.detach()
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, tensor.requires_grad)
        # In place, so that whoever shares it has the new one.
        torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_buffers(), *module.named_parameters()]


STRATEGIES: dict[str, Callable[[nn.Module, TrainConfig, Ranks], Placed]] = {
    "single": single,
    "ddp": ddp,
    "fsdp2": fsdp2,
}


def give_back(placed: Placed, model: nn.Module, ranks: Ranks) -> None:
    """Bring what was placed back into `model` on the CPU; of what is sharded on rank 0 alone."""
    for block in blocks(model):
        block.__dict__.pop("forward", None)
    if placed.module is model:
        model.to("cpu")
        return
    there = dict(_tensors(placed.module))
    for name, own in _tensors(model):
        if type(own) in (Tensor, nn.Parameter):  # and not quantised
            tensor = whole(there[name].detach())
            if ranks.is_first:
                own.data = tensor.to("cpu", copy=True)  # gathered rows are padded, and share memory


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, of which this rank may hold some rows; every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of which the model's stacks are made: the members of its outermost ModuleLists."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


def _lighten(module: nn.Module, config: TrainConfig) -> None:
    if config.activation_checkpointing:
        keep_inputs(module)
    if config.compile:
        # All blocks share the code of their class, and so the limit to its variants: one for each
        # width, with and without a mask, of a fixed and then of any length.
        torch._dynamo.config.recompile_limit = MOST_VARIANTS
        for block in blocks(module):
            block.forward = torch.compile(block.forward)


def keep_inputs(module: nn.Module, contexts: Contexts | None = None) -> None:
    """Let the blocks of `module` keep their inputs alone; what else backward needs is computed
    again then. `contexts` are those of forward and of computing again.
    """
    # Without them their argument is left out, which what is compiled would not take.
    kept = _kept_by_its_inputs if contexts is None else _kept_under(contexts)
    # By `forward` of each block and not by wrapping it, so that no parameter's name changes.
    for block in blocks(module):
        block.forward = MethodType(kept, block)


def _kept_under(contexts: Contexts) -> Callable[..., Any]:
    def kept(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return type(block).forward(block, *args, **kwargs)

        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return kept


def _kept_by_its_inputs(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The block's output; what else backward needs is computed again then."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(block).forward(block, *args, **kwargs)

    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
