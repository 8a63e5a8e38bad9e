"""What LLaVA's training lacks for its tower: training it, keeping LoRA out of it, losing none of
it.

Flags of LLaVA-NeXT's names are added to LLaVA's own: `--unfreeze_mm_vision_tower True` and
`--mm_vision_tower_lr`. A tower that is trained is held in float32, for in half precision small
steps round to nothing; it is saved with the model, or in an adapter's `non_lora_trainables.bin`.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

from ..errors import UsageError
from ..model.blocks import RMSNorm
from . import llava_compat
from .tower import VisionTower

NON_LORA = "non_lora_trainables.bin"  # LLaVA's name for what an adapter folder holds beside LoRA
VISION = ("vision_tower", "mm_projector", "vision_resampler")


def install() -> Any:
    """LLaVA's module `llava.train.train`, with all of this in place. A second call changes nothing.

    To be called after `llava.install`.
    """
    train = llava_compat.install_training()
    if hasattr(train, "aimv2_mllm"):
        return train
    train.TrainingArguments = with_tower_flags(train.TrainingArguments)
    train.find_all_linear_names = _language_only(train.find_all_linear_names)
    trainer = train.LLaVATrainer
    trainer.__init__ = _then_train_tower(trainer.__init__)
    trainer.create_optimizer = _with_tower_rate(trainer.create_optimizer)
    trainer._save_checkpoint = _with_rest(trainer._save_checkpoint, train)
    trainer._load_from_checkpoint = _and_rest(trainer._load_from_checkpoint)
    # No weight decay on our norms either; the list is transformers'.
    importlib.import_module("llava.train.llava_trainer").ALL_LAYERNORM_LAYERS.append(RMSNorm)
    train.aimv2_mllm = True
    return train


def with_tower_flags(stock: type) -> type:
    """LLaVA's training arguments with ours behind them."""
    flags = [
        (
            "unfreeze_mm_vision_tower",
            bool,
            field(default=False, metadata={"help": "Train the vision tower too."}),
        ),
        (
            "mm_vision_tower_lr",
            Optional[float],  # noqa: UP045 (an old HfArgumentParser reads no X | None)
            field(default=None, metadata={"help": "The tower's own learning rate."}),
        ),
        (
            "attn_implementation",
            Optional[str],  # noqa: UP045
            field(default=None, metadata={"help": "As train_mem.py has it: flash_attention_2."}),
        ),
    ]
    # repr: transformers' own hides tokens.
    ours = make_dataclass("TrainingArguments", flags, bases=(stock,), repr=False)
    # Trainers pickle their arguments, under this name.
    ours.__module__ = stock.__module__
    return ours


def _language_only(stock: Callable[[nn.Module], list[str]]) -> Callable[[nn.Module], str]:
    """LoRA's targets as a pattern of whole names: LLaVA gives last words, which towers have too."""

    @functools.wraps(stock)
    def find_all_linear_names(model: nn.Module) -> str:
        leaves = "|".join(sorted(stock(model)))
        return rf"(?!.*\b(?:{'|'.join(VISION)})\b).*\.(?:{leaves})"

    return find_all_linear_names


def release_tower(model: Any, args: Any) -> None:
    """Make the tower of `model` trainable, in float32, if `args` say so."""
    if not args.unfreeze_mm_vision_tower:
        return
    tower = model.get_vision_tower()
    if not isinstance(tower, VisionTower):
        raise UsageError(
            "--unfreeze_mm_vision_tower trains towers that have a prefix, and LLaVA's own have none"
        )
    tower.vision_tower.float().requires_grad_(True)


def _then_train_tower(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def __init__(self: Any, model: Any, *rest: Any, args: Any, **options: Any) -> None:  # noqa: N807
        # The last moment before the optimizer: LLaVA has frozen what it freezes.
        release_tower(model, args)
        stock(self, model, *rest, args=args, **options)

    return __init__


def _with_tower_rate(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def create_optimizer(self: Any, *rest: Any, **options: Any) -> Any:
        made = self.optimizer is not None
        optimizer = stock(self, *rest, **options)
        if self.args.mm_vision_tower_lr is None or made:
            return optimizer
        tower = {id(p) for n, p in self.model.named_parameters() if ".vision_tower." in n}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in tower]
            if own:
                group["params"] = [p for p in group["params"] if id(p) not in tower]
                optimizer.add_param_group(
                    {**group, "params": own, "lr": self.args.mm_vision_tower_lr}
                )
        return optimizer

    return create_optimizer


def _with_rest(stock: Callable[..., None], train: Any) -> Callable[..., None]:
    """An adapter's checkpoint with what is trained beside LoRA, which LLaVA's leave out."""

    @functools.wraps(stock)
    def _save_checkpoint(self: Any, model: Any, trial: Any, *rest: Any, **options: Any) -> None:
        stock(self, model, trial, *rest, **options)
        if self.args.lora_enable:
            state = train.get_peft_state_non_lora_maybe_zero_3(self.model.named_parameters())
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            if self.args.should_save:
                torch.save(state, folder / NON_LORA)

    return _save_checkpoint


def _and_rest(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def _load_from_checkpoint(
        self: Any, checkpoint: str, model: Any = None, **options: Any
    ) -> None:
        stock(self, checkpoint, model, **options)
        path = Path(checkpoint) / NON_LORA
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            # The frozen weights are not in it; whatever is in it must have its place.
            if strange := self.model.load_state_dict(state, strict=False).unexpected_keys:
                raise UsageError(
                    f"{path} is of another model: there is no {strange[0]} here; "
                    "remove that checkpoint, or give another --output_dir"
                )
        elif self.args.lora_enable:
            raise UsageError(
                f"{checkpoint} has no {NON_LORA}, so its projector is lost: "
                "remove it, or give another --output_dir"
            )

    return _load_from_checkpoint


def trained_parts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parts of the model, each with its number of parameters and how many of them are trained."""
    parts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        part = next((word for word in VISION if f".{word}." in f".{name}."), "llm")
        part = f"lora in {part}" if "lora_" in name else part
        count, trained = parts.get(part, (0, 0))
        size = parameter.numel()
        parts[part] = count + size, trained + size * parameter.requires_grad
    return parts
