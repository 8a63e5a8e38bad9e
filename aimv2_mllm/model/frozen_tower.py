"""The tower of a Llava that is not trained, taken out of it: features that depend on a picture and
on nothing else, so that they may be kept.

What a tower makes of a picture depends, in its last bits, on how many others it sees at once. Here
that number is always the same, and so are the bits, whoever the others are.

Letters in shapes: B pictures, H, W pixels, N patches and M tokens of one picture, D and E widths.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2_mllm.model.families import chosen_layers, read_patches
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.shards import weights_sha256

# Pictures that go through the tower at once. A CPU is as fast with one (AIMv2-L: 18.4 s for 8 one
# by one, 19.3 s together); an accelerator needs some thousand patches to be busy.
AT_ONCE = {"cpu": 1}
AT_ONCE_ELSEWHERE = 16
# Of how a picture is decoded and features are computed and kept: others do not mix with them.
VERSION = 2
# What transformers writes into a vision config that changes nothing, or is said in other words.
SAID_ELSEWHERE = frozenset(
    {
        "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
        "tie_last_hidden_states", "vision_use_head", "output_hidden_states",
    }
)  # fmt: skip


class FrozenTower:
    """Features of the `dtype` in which a connector reads them, by the tower of `body`, the
    `.model` of a Llava.

    It stands outside of the Llava from now on, on the CPU until it is needed; no module of its
    own, so that nobody moves, shards or copies it.
    """

    def __init__(self, body: Any, dtype: torch.dtype) -> None:
        self._body, self.dtype = body, dtype
        self._tower: Any = body.vision_tower
        self._tower.requires_grad_(False).eval()
        self.num_read = self.num_kept = 0  # pictures seen by the tower, and those it was spared
        body.vision_tower = nn.Module()
        self._hook = body.register_forward_pre_hook(self._seen, with_kwargs=True)

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        return self

    def put_back(self) -> None:
        """Give the Llava its tower again."""
        self._hook.remove()
        self._body.vision_tower = self._tower.to("cpu")

    @staticmethod
    def at_once(device: torch.device) -> int:
        """How many pictures go through a tower on `device` together."""
        return AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE)

    @torch.no_grad()
    def read(self, pixel_values: Tensor) -> Tensor:
        """The features (B, N, D) of pixel_values (B, 3, H, W), on their device."""
        device = pixel_values.device
        tower, size = self._tower.to(device), self.at_once(device)
        pixel_values = pixel_values.to(next(tower.parameters()).dtype)
        parts = []
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            for some in torch.split(pixel_values, size):
                full = F.pad(some, (0, 0, 0, 0, 0, 0, 0, size - len(some)))
                parts.append(self._patches(full)[: len(some)].to(self.dtype))
        return torch.cat(parts)

    def embedded(
        self,
        connector: nn.Module,
        features: Tensor | None,
        pixel_values: Tensor | None,
        is_cached: Tensor,
    ) -> Tensor:
        """The LLM's embeddings (B, M, E) of pictures of which some have `features` and the others
        pixel values, in the order that `is_cached` (B,) says."""
        read = None if pixel_values is None else self.read(pixel_values)
        kind = read if features is None else features
        assert kind is not None, "a batch without pictures"
        both = kind.new_empty(len(is_cached), *kind.shape[1:])
        for mask, some in ((is_cached, features), (~is_cached, read)):
            if some is not None:
                both[mask] = some
        self.num_kept += 0 if features is None else len(features)
        self.num_read += 0 if read is None else len(read)
        embeddings: Tensor = connector(both.to(next(connector.parameters()).dtype))
        return embeddings

    def _seen(
        self, body: Any, args: tuple[Any, ...], words: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give the Llava's body embeddings in place of pictures."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        if "is_cached" not in words:  # nobody sees anything
            return args, words
        said = [words.pop(name, None) for name in ("features", "pixel_values", "is_cached")]
        embeddings = self.embedded(body.multi_modal_projector, *said)
        image = BaseModelOutputWithPooling(pooler_output=list(embeddings))
        return args, {**words, "mm_encoder_outputs": {"image": image}}

    def about(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """All that decides what the features of a picture are, but for the picture."""
        config = self._tower.config.to_dict()
        layers, norm, others = self._choice()
        return {
            "version": VERSION,
            "tower": {k: v for k, v in sorted(config.items()) if k not in SAID_ELSEWHERE},
            "weights": weights_sha256(self._tower.state_dict()),
            "layers": list(layers),
            "norm": norm,
            "strategy": others,
            "preprocessing": asdict(preprocessing),
            "dtype": str(self.dtype),
        }

    def _choice(self) -> tuple[tuple[int, ...], str, str]:
        """From which layers features are read, before or after the last norm, and of which
        tokens."""
        config, depth = self._body.config, int(self._tower.config.num_hidden_layers)
        layers = chosen_layers(config.vision_feature_layer, depth)
        strategy = str(config.vision_feature_select_strategy)
        if hasattr(config, "vision_feature_norm"):
            return layers, config.vision_feature_norm, strategy
        tied = getattr(self._tower.config, "tie_last_hidden_states", False) and layers == (depth,)
        return layers, "post" if tied else "pre", strategy

    def _patches(self, pixel_values: Tensor) -> Tensor:
        """What the Llava's own class gives to its connector: (B, N, D)."""
        config, (layers, norm, strategy) = self._body.config, self._choice()
        if hasattr(config, "vision_feature_norm"):
            return read_patches(config.tower, self._tower, pixel_values, layers, norm)
        hidden = self._tower(pixel_values, output_hidden_states=True).hidden_states
        first = 1 if strategy == "default" else 0
        chosen = [hidden[layer][:, first:] for layer in layers]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)


def digest_of(about: Mapping[str, Any]) -> str:
    """A name for what `FrozenTower.about` says."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
