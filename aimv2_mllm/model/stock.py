"""What of a tower transformers' own Llava can express, and the tower in transformers' words.

Whoever cannot be expressed is assembled as our own kind of Llava, never as something else.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aimv2_mllm.model.encoder import AIMv2Encoder
from aimv2_mllm.model.families import side_of
from aimv2_mllm.model.layouts import transformers_config
from aimv2_mllm.model.namings import NAMINGS, rename
from aimv2_mllm.model.towers import Tower

# The families that transformers' own Llava can read; the others have registers, or other inputs.
STOCK = ("aimv2", "clip", "siglip", "dinov2")
# What drops the one token before the patches; transformers' word for dropping nothing is "full".
STRATEGIES = {"clip": "default", "dinov2": "default"}


def is_stock(tower: Tower, connector: str, options: Mapping[str, Any]) -> bool:
    """Whether transformers' own Llava computes what this tower and connector do.

    It has the MLP of two layers only; drops one token before the patches or none; knows no other
    size than the vision config's; and has hidden states before the last norm, but for the last one
    where AIMv2 and SigLIP are told to tie it to their output.
    """
    if connector != "mlp" or options.get("depth", 2) != 2 or tower.kind not in STOCK:
        return False
    if tower.kind == "aimv2" and tower.config.native:
        return False
    is_last = tower.layers == (int(tower.config.num_hidden_layers),)
    tied = tower.kind in ("aimv2", "siglip") and is_last
    own_size = tower.preprocessing.image_size == side_of(tower.config.image_size)
    return own_size and (tower.norm == "pre" or tied)


def vision_config(tower: Tower) -> Any:
    """The configuration of transformers' network for `tower`, without a pooling head."""
    from transformers import AutoConfig

    if isinstance(tower.module, AIMv2Encoder):
        raw = {k: v for k, v in transformers_config(tower.config).items() if k != "architectures"}
    else:
        raw = tower.config.to_dict()
    tied = is_stock(tower, "mlp", {}) and tower.norm == "post"
    raw |= {"tie_last_hidden_states": tied, "vision_use_head": False}
    if not tower.kind.startswith("siglip"):
        del raw["vision_use_head"]
    raw.pop("_name_or_path", None)  # a path of this machine
    kind = raw.pop("model_type")
    return AutoConfig.for_model(kind, **raw)


def tower_state(tower: Tower) -> dict[str, Tensor]:
    """The tower's tensors under the names of transformers' network, without a pooling head."""
    state = tower.module.state_dict()
    if isinstance(tower.module, AIMv2Encoder):
        return rename(state, NAMINGS["transformers"])
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def said_layers(tower: Tower) -> int | list[int]:
    """The tower's layers as a Llava's config says them: counted from the end, one or several."""
    depth = int(tower.config.num_hidden_layers)
    layers = [layer - depth - 1 for layer in tower.layers]
    return layers[0] if len(layers) == 1 else layers
