"""The MLP connector under the names that LLaVA and transformers give its tensors.

Refuses what is not such a connector, to the tensor.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from ..errors import UsageError, nearest
from .shards import demand_fit

# What the tensors of a depth-2 MLP are called: ours, LLaVA's in `mm_projector.bin` and in its
# checkpoints, transformers' in the checkpoints of its Llava.
LAYERS = {
    "plain": {"0": "0", "2": "2"},
    "llava": {"0": "model.mm_projector.0", "2": "model.mm_projector.2"},
    "transformers": {
        "0": "multi_modal_projector.linear_1",
        "2": "multi_modal_projector.linear_2",
    },
}
_NAME = re.compile(r"(?:.*\.)?(?:(?:mm_projector\.)?(0|2)|linear_(1|2))\.(weight|bias)")


def rename_projector(state: Mapping[str, Tensor], naming: str) -> dict[str, Tensor]:
    """The tensors of a depth-2 `mlp`, named in any of LAYERS' ways, as `naming` calls them.

    UsageError for a tensor that such a connector has not, for one that is missing, and for widths
    that do not fit together.
    """
    if naming not in LAYERS:
        raise UsageError(
            f"naming is {naming!r}, and must be one of {', '.join(LAYERS)}{nearest(naming, LAYERS)}"
        )
    plain = _plain(state)
    return {
        f"{LAYERS[naming][layer]}.{kind}": plain[f"{layer}.{kind}"]
        for layer in LAYERS[naming]
        for kind in ("weight", "bias")
    }


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise UsageError(f"{name} is no tensor of an MLP connector of two layers")
        layer = match[1] or {"1": "0", "2": "2"}[match[2]]
        plain[f"{layer}.{match[3]}"] = tensor
    weight = plain.get("0.weight")
    if weight is None or weight.ndim != 2:
        raise UsageError("an MLP connector has a first layer's weight (E, D), and here is none")
    out_features = weight.shape[0]
    expected = {
        "0.weight": weight,
        "0.bias": weight.new_empty(out_features),
        "2.weight": weight.new_empty(out_features, out_features),
        "2.bias": weight.new_empty(out_features),
    }
    demand_fit(plain, expected, "the MLP connector")
    return plain
