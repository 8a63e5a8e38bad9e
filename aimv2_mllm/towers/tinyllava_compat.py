"""What TinyLLaVA_Factory needs to run on a Python and libraries newer than its own (3.10,
transformers 4.40.1): each fix changes nothing where nothing is broken. In brackets, the first
transformers that breaks it."""

import sys
from importlib import import_module
from typing import Any

from .llava_compat import fit_trainer, restore_norms


def install_model() -> None:
    """Its model: `_supports_sdpa` is asked before there is a language model [4.5x], and
    `tie_weights` is given arguments [5.0]."""
    modeling: Any = import_module("tinyllava.model.modeling_tinyllava")
    base, model = modeling.TinyLlavaPreTrainedModel, modeling.TinyLlavaForConditionalGeneration
    base._supports_sdpa = True
    model.tie_weights = lambda self, *_, **__: self.language_model.tie_weights()


def install_training() -> None:
    """Its templates and its trainer, which is LLaVA's."""
    _install_templates()
    trainer = restore_norms()
    own: Any = import_module("tinyllava.train.tinyllava_trainer").LLaVATrainer
    if not getattr(own, "aimv2_mllm", False):
        fit_trainer(own, trainer.Trainer)
        own.aimv2_mllm = True


def _install_templates() -> None:
    """Its formatters are defaults of dataclasses, which Python 3.11 demands to be hashable."""
    template = "tinyllava.data.template"
    try:
        import_module(template)
    except ValueError:
        found: list[Any] = [*vars(sys.modules[f"{template}.formatter"]).values()]
        for formatter in found:
            if isinstance(formatter, type) and vars(formatter).get("__hash__", ...) is None:
                setattr(formatter, "__hash__", object.__hash__)  # noqa: B010
        import_module(template)
