"""What a tower must give, by a way that shares nothing with the plug-ins."""

import torch
import transformers

from aimv2_mllm.model.weights import load_encoder


def features_of(tower: str, pixels: torch.Tensor) -> torch.Tensor:
    """The patch tokens of `aimv2:FOLDER` by our loader; of `hf:FOLDER` by a direct call: CLIP's
    last layer without the class token and before the last norm, SigLIP's after it."""
    kind, _, folder = tower.partition(":")
    with torch.no_grad():
        if kind == "aimv2":
            features: torch.Tensor = load_encoder(folder)(pixels)
            return features
        if folder.endswith("siglip"):
            return transformers.SiglipVisionModel.from_pretrained(folder)(pixels).last_hidden_state
        network = transformers.CLIPVisionModel.from_pretrained(folder)
        return network(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def is_unused(name: str) -> bool:
    """Whether a parameter of a foreign tower is behind the tokens: pooling, CLIP's last norm."""
    return ".head." in name or "post_layernorm" in name
