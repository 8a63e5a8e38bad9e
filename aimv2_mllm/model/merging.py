"""Adapters of a quantised LLM merged onto its full weights, which are never all in memory.

Owns where merged weights wait until they are written: in a file without a name, beside the result.
"""

import mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import nn

from .quantising import is_quantised


def share_unquantised(source: nn.Module, target: nn.Module) -> None:
    """Let every weight of `source` that is not quantised there be that of `target`, by name."""
    have = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if not is_quantised(have[name]):
            parameter.data = have[name].data


def merged_aside(adapters: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model under peft's `adapters`, these merged one layer at a time; what they changed is in
    `dtype`, and mapped from a file on the disk of `folder` that is gone when the model is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in adapters.get_base_model().modules() if isinstance(m, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    shapes = [weight.shape for weight in weights]
    with TemporaryFile(dir=folder) as file:
        for layer, weight in zip(layers, weights, strict=True):
            # Not where it is mapped from, which would stay in memory as long as its neighbours.
            weight.data = weight.data.clone()
            layer.merge()
            file.write(weight.data.to(dtype).contiguous().view(torch.uint8).numpy())
            weight.data = weight.data.new_empty(0, dtype=dtype)
        file.flush()
        merged = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=dtype)
    parts = torch.split(merged, [shape.numel() for shape in shapes])
    for weight, part, shape in zip(weights, parts, shapes, strict=True):
        weight.data = part.view(shape)
    return adapters.unload()
