"""The pre-training decoder on disk, beside its encoder: one safetensors file that says its sizes.

Refuses a file whose tensors do not fit, to the tensor.
"""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UsageError
from .pretrainer import AIMv2ForPreTraining, DecoderConfig
from .shapes import shapes_only

DECODER_FILE = "decoder.safetensors"
ENCODER = "encoder."  # what the encoder's tensors begin with, which lie in a file of their own


def save_decoder(model: AIMv2ForPreTraining, folder: Path) -> None:
    """Write what of `model` is not its encoder to `folder`."""
    if shapes_only():
        return
    state = model.state_dict().items()
    rest = {name: tensor.detach() for name, tensor in state if not name.startswith(ENCODER)}
    config = json.dumps(asdict(model.decoder_config))
    save_file(rest, folder / DECODER_FILE, metadata={"decoder": config})


def read_decoder(folder: Path) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """The sizes and the tensors of the decoder in `folder`; UsageError if there is none."""
    path = folder / DECODER_FILE
    if not path.is_file():
        raise UsageError(f"{folder} has no {DECODER_FILE}: give the result of a pretrain stage")
    try:
        with safe_open(path, "pt") as file:
            config = DecoderConfig(**json.loads(file.metadata()["decoder"]))
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{path} is no decoder of a pretrain stage ({error})") from error


def load_decoder(model: AIMv2ForPreTraining, folder: Path) -> None:
    """Put the decoder in `folder` into `model`; UsageError where it is another one. A model on the
    meta device is told apart too, and no weight is read for it."""
    config, weights = read_decoder(folder)
    if config != model.decoder_config:
        was, now = asdict(config), asdict(model.decoder_config)
        odd = ", ".join(
            f"{key} {was[key]} instead of {now[key]}" for key in was if was[key] != now[key]
        )
        raise UsageError(f"{folder / DECODER_FILE} is another decoder: it has {odd}")
    own = {k: v for k, v in model.state_dict().items() if k.startswith(ENCODER)}
    is_sketch = model.start.is_meta
    if is_sketch:
        weights = {name: weight.to("meta") for name, weight in weights.items()}
    try:
        model.load_state_dict({**weights, **own}, strict=True, assign=is_sketch)
    except RuntimeError as error:
        raise UsageError(f"{folder / DECODER_FILE} does not fit the encoder: {error}") from error
