"""What people lose days to, looked at in seconds before a run: `aimv2-llava doctor`.

LLaVA's own training runs up to its first step, with the LLM's weights left out (they lie on the
meta device); then the tower, the projector and the samples that it would have used are examined.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .examined import versions
from .llava_flags import check_flags, read_flags
from .llava_samples import Say, examine_images, examine_samples
from .llava_training import install as install_training
from .llava_training import release_tower, trained_parts
from .llava_weights import read_vision
from .tower import CHECKPOINT, VisionTower

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "safetensors", "pillow")
OTHERS = ("llava", "llava-torch", "aimv2-mllm")


class _Stop(Exception):
    """No error: LLaVA has built everything."""


class _Examined:
    """Stands for LLaVA's trainer, and keeps what that would have been given."""

    given: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        type(self).given = given

    def train(self, **_: Any) -> None:
        raise _Stop


def examine(words: Sequence[str], *, num_samples: int, say: Callable[[str], None]) -> int:
    """Examine the run that LLaVA's training flags `words` describe, in lines of ok, note and FAULT;
    the number of faults. Raises UsageError where the flags alone are wrong."""
    train = install_training()
    flags = read_flags(train, words)
    check_flags(flags)
    faults = 0

    def tell(kind: str, text: str) -> None:
        nonlocal faults
        faults += kind == "FAULT"
        say(f"{kind:5} {text}")

    tell("ok", f"versions: {versions(PACKAGES, OTHERS)}")
    model, given = _build(train, words)
    release_tower(model, given["args"])
    tower = model.get_vision_tower()
    if isinstance(tower, VisionTower):
        _examine_tower(tower, tell)
    _examine_parts(model, given["args"], tell)
    data = given["train_dataset"]
    examine_images(data, tell)
    examine_samples(model, data, num_samples=num_samples, tell=tell)
    return faults


def _build(train: Any, words: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The model and the trainer's arguments that LLaVA makes of `words`, up to its first step."""
    llm = train.LlavaLlamaForCausalLM

    class WithoutWeights:
        @staticmethod
        def from_pretrained(source: str, **options: Any) -> Any:
            config = llm.config_class.from_pretrained(source)
            with torch.device("meta"):
                model = llm(config)
            read_vision(model, Path(source))
            return model

    stock = train.LlavaLlamaForCausalLM, train.LLaVATrainer
    argv = sys.argv
    train.LlavaLlamaForCausalLM, train.LLaVATrainer = WithoutWeights, _Examined
    # Quantisation needs the weights.
    sys.argv = ["train", *words, "--bits", "16"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.train()
    except _Stop:
        pass
    finally:
        sys.argv = argv
        train.LlavaLlamaForCausalLM, train.LLaVATrainer = stock
    return _Examined.given["model"], _Examined.given


def _examine_tower(tower: VisionTower, tell: Say) -> None:
    """That the tower's weights are finite and its source's, in the dtype of training."""
    own = tower.vision_tower.state_dict()
    broken = [name for name, tensor in own.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        tell("FAULT", f"tower: {len(broken)} tensors are not finite in {tower.dtype}: {broken[0]}")
    if tower.origin == CHECKPOINT:
        tell("ok", f"tower: {len(own)} tensors, tuned ones out of the checkpoint")
    else:
        source = tower.source.read().state_dict()
        differ = [n for n, tensor in own.items() if not torch.equal(tensor, source[n].to(tensor))]
        if differ:
            tell("FAULT", f"tower: {len(differ)} tensors are not {tower.name}'s: {differ[0]}")
        else:
            tell("ok", f"tower: {len(own)} tensors, finite, equal to {tower.name}")
    depth = tower.config.num_hidden_layers
    if tower.layer != depth:
        tell(
            "note",
            f"tower: layer {tower.layer} of {depth} is asked for, before the final norm; AIMv2's "
            "features are those of --mm_vision_select_layer -1",
        )


def _examine_parts(model: Any, args: Any, tell: Say) -> None:
    """What is trained, where LoRA is, and whether the projector is new."""
    inner = model.get_model()
    shapes = [tuple(tensor.shape) for tensor in inner.mm_projector.parameters()]
    kind = model.config.mm_projector_type
    tell("ok", f"projector: {kind}, {model.config.mm_hidden_size} to {model.config.hidden_size} "
         f"wide, shapes {shapes}")  # fmt: skip
    parts = trained_parts(model)
    for part, (count, trained) in parts.items():
        share = (
            "frozen" if not trained else "trained" if trained == count else f"{trained:,} trained"
        )
        tell("ok", f"part: {part:20} {count:>14,} parameters, {share}")
    inside = sum(count for part, (count, _) in parts.items() if part == "lora in vision_tower")
    if inside:
        tell("FAULT", f"LoRA: {inside:,} parameters of it lie in the vision tower")
    elif args.lora_enable:
        tell("ok", "LoRA: none in the vision tower")
    if not any(trained for _, trained in parts.values()):
        tell("FAULT", "nothing is trained")
