"""What LLaVA needs to run on libraries newer than its own (transformers 4.37.2): each fix changes
nothing where nothing is broken. In brackets, the first transformers that breaks it.

Methods are replaced in place: LLaVA says `super(LLaVATrainer, self)`, so a subclass under that name
would call itself for ever.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

LANGUAGE_MODELS = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
}


def install_generation() -> None:
    """`generate` hands over `cache_position`, which LLaVA's forward does not take [4.38 to 5.0]."""
    for name, model in LANGUAGE_MODELS.items():
        cls = getattr(importlib.import_module(f"llava.model.language_model.{name}"), model)
        if not hasattr(cls.prepare_inputs_for_generation, "aimv2_mllm"):
            known = set(inspect.signature(cls.forward).parameters)
            cls.prepare_inputs_for_generation = _only(cls.prepare_inputs_for_generation, known)


def _only(method: Callable[..., dict[str, Any]], known: set[str]) -> Callable[..., dict[str, Any]]:
    # wraps: `generate` reads the signature to learn whether inputs_embeds are taken.
    @functools.wraps(method)
    def prepare(self: Any, *rest: Any, **options: Any) -> dict[str, Any]:
        inputs = method(self, *rest, **options)
        return {name: value for name, value in inputs.items() if name in known}

    prepare.aimv2_mllm = True  # type: ignore[attr-defined]
    return prepare


def install_training() -> Any:
    """Make `llava.train.train` importable and its trainer run; the module."""
    trainer = restore_norms()
    own = importlib.import_module("llava.train.llava_trainer")
    train = importlib.import_module("llava.train.train")
    if hasattr(own, "aimv2_mllm"):
        return train
    for module in (own, train):
        module.maybe_zero_3 = gathered  # type: ignore[attr-defined]
    fit_trainer(own.LLaVATrainer, trainer.Trainer)
    own.aimv2_mllm = True  # type: ignore[attr-defined]
    return train


def restore_norms() -> Any:
    """`transformers.trainer` with the list of norms that it had [4.53]; the module."""
    trainer: Any = importlib.import_module("transformers.trainer")
    if not hasattr(trainer, "ALL_LAYERNORM_LAYERS"):
        llama = importlib.import_module("transformers.models.llama.modeling_llama")
        # Llama's norm was in it too, and so kept out of weight decay.
        trainer.ALL_LAYERNORM_LAYERS = [nn.LayerNorm, llama.LlamaRMSNorm]
    return trainer


def gathered(param: Tensor, ignore_status: bool = False, name: str | None = None) -> Tensor:
    """A whole parameter on the CPU. LLaVA's own imports deepspeed to find out that it is not used,
    after the training, when all is to be saved."""
    if hasattr(param, "ds_id"):
        zero: Any = importlib.import_module("deepspeed").zero
        with zero.GatheredParameters([param]):
            return param.data.detach().cpu().clone()
    return param.detach().cpu().clone()


def fit_trainer(own: Any, base: Any) -> None:
    """Fit LLaVA's trainer `own` to the signatures of transformers' Trainer `base`."""

    def takes(method: Any, name: str) -> bool:
        return name in inspect.signature(method).parameters

    if not takes(base.__init__, "tokenizer"):  # [5.0] is called processing_class

        def __init__(self: Any, *rest: Any, tokenizer: Any = None, **options: Any) -> None:  # noqa: N807
            base.__init__(self, *rest, processing_class=tokenizer, **options)

        own.__init__ = __init__
    if takes(base._get_train_sampler, "train_dataset"):  # [4.5x]
        sampler = own._get_train_sampler

        def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
            if self.args.group_by_modality_length:
                return sampler(self)
            return base._get_train_sampler(self, train_dataset)

        own._get_train_sampler = _get_train_sampler
    if takes(base.create_optimizer, "model"):  # [5.x]
        optimizer = own.create_optimizer
        own.create_optimizer = lambda self, model=None: optimizer(self)
    if not takes(base._save_checkpoint, "metrics"):  # [4.47]
        save = own._save_checkpoint

        def _save_checkpoint(self: Any, model: Any, trial: Any, metrics: Any = None) -> None:
            if getattr(self.args, "tune_mm_mlp_adapter", False):
                save(self, model, trial)
            else:
                base._save_checkpoint(self, model, trial)

        own._save_checkpoint = _save_checkpoint
