"""The weights of a model that was built from its shapes, without holding any of them twice.

Owns what transformers' `from_pretrained` does for a folder: drawing what is new, and computing the
buffers that no file has.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .connectors import build_connector
from .shapes import shapes_only


@torch.no_grad()
def draw_connector(model: Any) -> None:
    """Give the Llava `model`, on the meta device, a connector with the numbers that it would have
    had if it had been built elsewhere: its own, and what transformers draws anew."""
    config, shapes = model.config, model.model.multi_modal_projector
    given = getattr(config, "connector", None)
    if given is None:
        drawn: nn.Module = type(shapes)(config)
    else:
        drawn = build_connector(
            **given, in_features=shapes.in_features, out_features=shapes.out_features
        )
    if not shapes_only():
        drawn.apply(model.model._init_weights)
    model.model.multi_modal_projector = drawn


@torch.no_grad()
def take_weights(network: Any, state: Mapping[str, Tensor]) -> None:
    """Let `state` be all of the weights of transformers' `network`, which is on the meta device, in
    the dtype that it has there, and compute its other buffers. Parts of larger tensors are copied.
    """
    shapes = network.state_dict()
    own = {n: tensor.to(shapes[n].dtype) for n, tensor in state.items() if n in shapes}
    for name, tensor in own.items():
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            own[name] = tensor.clone()
    network.load_state_dict({**state, **own}, strict=True, assign=True)
    if shapes_only():
        return
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                empty = torch.empty_like(buffer, device=torch.get_default_device())
                module.register_buffer(name, empty, persistent=False)
    for parameter in network.parameters():
        parameter._is_hf_initialized = True  # transformers' word for what is not to be drawn
    network.initialize_weights()
