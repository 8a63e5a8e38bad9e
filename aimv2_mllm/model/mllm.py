"""The assembled multimodal LLM: transformers' Llava with an AIMv2 tower and the two-layer MLP
connector.

What is saved is a stock Llava folder, which other tools load without us. The connector reads the
features after AIMv2's final norm and all of its patches: there is no class token to drop.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.encoder import AIMv2Encoder
from aimv2_mllm.model.layouts import transformers_config
from aimv2_mllm.model.namings import NAMINGS, rename
from aimv2_mllm.model.preprocessing import Preprocessing

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

TINY_LLM = Path(__file__).parents[1] / "assets" / "tiny_llm"
IMAGE_TOKEN = "<image>"


def llm_source(name: str) -> str:
    """Where the LLM called `name` lies: our own tiny one, or a folder or hub id as given."""
    return str(TINY_LLM) if name == "tiny_llm" else name


def load_tokenizer(name: str, *, talks: bool = True, chat_template: str | None = None) -> Any:
    """The tokenizer of the LLM `name`, with an image token and a chat template, its own or,
    where it has none, the one given; UsageError if it cannot serve.

    One that only reads captions (`talks` false) needs an end token, and is left as it is.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(llm_source(name), trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(
            f"{name}: no tokenizer can be loaded from there ({_first_line(error)})"
        ) from None
    if not talks:
        if tokenizer.eos_token_id is None:
            raise UsageError(f"{name}: its tokenizer has no end token, so no caption would end")
        return tokenizer
    tokenizer.chat_template = tokenizer.chat_template or chat_template
    if tokenizer.chat_template is None:
        raise UsageError(
            f"{name}: its tokenizer has no chat template, so nobody knows how to talk to it; for an"
            " LLM that was tuned with LLaVA's or Vicuna's, give data.template=v1"
        )
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_llm(name: str) -> "PreTrainedModel":
    """The causal LLM `name` in float32; UsageError if there is none, or not all of it."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            llm_source(name),
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(
            f"{name}: no causal LLM can be loaded from there ({_first_line(error)})"
        ) from None
    demand_whole(report, name)
    return model


def demand_whole(report: dict[str, Any], where: str) -> None:
    """UsageError unless transformers' loading report says that weights and model fit exactly."""
    faults = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    faults += [f"{name} is left over" for name in sorted(report["unexpected_keys"])]
    faults += [f"{name} has another shape" for name, *_ in sorted(report["mismatched_keys"])]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UsageError(
            f"{where}: its weights do not fit its config.json: {', '.join(faults[:3])}{more}"
        )


def layer_names(name: str) -> list[str]:
    """The names of the LLM's linear layers inside its blocks, without loading its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(llm_source(name), trust_remote_code=False)
        with torch.device("meta"):
            return linear_layers(AutoModelForCausalLM.from_config(config).base_model)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name}: no causal LLM can be loaded from there ({_first_line(error)})"
        ) from None


def linear_layers(model: torch.nn.Module) -> list[str]:
    """The last pieces of the names of a model's linear layers, each once, in order."""
    named = [n for n, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in named))


def assemble(
    encoder: AIMv2Encoder, llm: "PreTrainedModel", tokenizer: Any
) -> "LlavaForConditionalGeneration":
    """A Llava of this tower and this LLM, their weights copied, with a freshly drawn connector.

    `tokenizer` is `load_tokenizer`'s; where it has more tokens than the LLM, the LLM's embeddings
    grow.
    """
    from transformers import Aimv2VisionConfig, LlavaConfig, LlavaForConditionalGeneration

    if len(tokenizer) > llm.get_input_embeddings().weight.shape[0]:
        llm.resize_token_embeddings(len(tokenizer))
    vision = {k: v for k, v in transformers_config(encoder.config).items() if k != "architectures"}
    config = LlavaConfig(
        vision_config=Aimv2VisionConfig(**vision),
        text_config=llm.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=encoder.config.num_patches,
        tie_word_embeddings=llm.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    tower = rename(encoder.state_dict(), NAMINGS["transformers"])
    model.model.vision_tower.load_state_dict(tower, strict=True)
    model.model.language_model.load_state_dict(llm.base_model.state_dict(), strict=True)
    model.lm_head.load_state_dict(llm.get_output_embeddings().state_dict(), strict=True)
    model.config.text_config.name_or_path = ""  # a path of this machine
    model.generation_config = llm.generation_config
    return model


def build_processor(
    tokenizer: Any, preprocessing: Preprocessing, patch_size: int
) -> "LlavaProcessor":
    """The processor that belongs to an assembled model: pictures by Pillow alone, text by the LLM's
    tokenizer."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    size = preprocessing.image_size
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(preprocessing.mean),
        image_std=list(preprocessing.std),
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE_TOKEN,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
