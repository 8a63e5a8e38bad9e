"""The vision weights that a LLaVA checkpoint holds, read without its LLM."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

PARTS = ("vision_tower.", "mm_projector.")


def read_vision(model: Any, folder: Path) -> None:
    """Put the tower and the projector that the safetensors files in `folder` hold into `model`,
    whose weights lie on the meta device. A plain LLM holds none, and changes nothing."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if any(part in name for part in PARTS):
                    state[name] = file.get_tensor(name)
    if state:
        model.load_state_dict(state, strict=False, assign=True)
