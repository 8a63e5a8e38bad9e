"""Causal LLMs of transformers and their tokenizers: our own tiny one, a folder, or a hub id.

Refuses what is not all there, and tokenizers that cannot serve.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aimv2_mllm.errors import UsageError, first_line
from aimv2_mllm.marks import IMAGE_TOKEN
from aimv2_mllm.model.foreign import demand_whole
from aimv2_mllm.model.hub import pinned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TINY_LLM = Path(__file__).parents[1] / "assets" / "tiny_llm"


def llm_source(name: str) -> str:
    """Where the LLM called `name` lies: our own tiny one, or a folder or hub id (org/name or
    org/name@revision) as given."""
    return str(TINY_LLM) if name == "tiny_llm" else name


def load_tokenizer(name: str, *, talks: bool = True, chat_template: str | None = None) -> Any:
    """The tokenizer of the LLM `name`, with an image token and a chat template, its own or,
    where it has none, the one given; UsageError if it cannot serve.

    One that only reads captions (`talks` false) needs an end token, and is left as it is.
    """
    from transformers import AutoTokenizer

    source, words = pinned(llm_source(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **words)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(
            f"{name}: no tokenizer can be loaded from there ({first_line(error)})"
        ) from None
    forget_how_it_was_loaded(tokenizer)
    if not talks:
        if tokenizer.eos_token_id is None:
            raise UsageError(f"{name}: its tokenizer has no end token, so no caption would end")
        return tokenizer
    tokenizer.chat_template = tokenizer.chat_template or chat_template
    if tokenizer.chat_template is None:
        raise UsageError(
            f"{name}: its tokenizer has no chat template, so nobody knows how to talk to it; give"
            " the LLM's variant that was tuned to talk or, where </s> ends a text, data.template=v1"
        )
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def forget_how_it_was_loaded(tokenizer: Any) -> None:
    """Keep out of a saved tokenizer whether the hub was within reach when it was loaded."""
    tokenizer.init_kwargs.pop("local_files_only", None)


def load_llm(name: str, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """The causal LLM `name` in `dtype`; UsageError if there is none, or not all of it."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    source, words = pinned(llm_source(name))
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
            **words,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(
            f"{name}: no causal LLM can be loaded from there ({first_line(error)})"
        ) from None
    demand_whole(report, name)
    return model


def sizes_of(name: str) -> tuple[int, int]:
    """The width of the LLM's embeddings and how many tokens it has room for, without loading its
    weights."""
    config = _config(name)
    return int(config.hidden_size), room_of(config)


def room_of(config: Any) -> int:
    """How many tokens an LLM of that config has room for."""
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def _config(name: str) -> Any:
    from transformers import AutoConfig

    source, words = pinned(llm_source(name))
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **words)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name}: no causal LLM can be loaded from there ({first_line(error)})"
        ) from None


def layer_names(name: str) -> list[str]:
    """The names of the LLM's linear layers inside its blocks, without loading its weights."""
    return layers_of(_config(name), name)


def layers_of(config: Any, name: str) -> list[str]:
    """The names of the linear layers inside the blocks of the LLM `name`, which has `config`."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return linear_layers(AutoModelForCausalLM.from_config(config).base_model)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name}: no causal LLM can be loaded from there ({first_line(error)})"
        ) from None


def linear_layers(model: torch.nn.Module) -> list[str]:
    """The last pieces of the names of a model's linear layers, each once, in order."""
    named = [n for n, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in named))
