"""The assembled multimodal LLM: a Llava of any tower, any connector and any causal LLM.

With the two-layer MLP and a tower that transformers' Llava reads as we do, what is saved is a stock
Llava folder, which other tools load without us; any other pair is saved as our own kind of Llava,
and says so. A connector reads patches and nothing else, of AIMv2 after its final norm.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aimv2_mllm.errors import UsageError, first_line
from aimv2_mllm.marks import IMAGE_TOKEN
from aimv2_mllm.model.connectors import build_connector
from aimv2_mllm.model.families import side_of
from aimv2_mllm.model.foreign import load_image_text
from aimv2_mllm.model.hub import pinned
from aimv2_mllm.model.joining import draw_connector, take_weights
from aimv2_mllm.model.llms import forget_how_it_was_loaded
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.stock import (
    STRATEGIES,
    is_stock,
    said_layers,
    tower_state,
    vision_config,
)
from aimv2_mllm.model.towers import Tower

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel


def assemble(
    tower: Tower,
    llm: "PreTrainedModel",
    tokenizer: Any,
    *,
    connector: str = "mlp",
    options: Mapping[str, Any] | None = None,
) -> "LlavaForConditionalGeneration":
    """A Llava of this tower and this LLM, their weights taken over, with a freshly drawn connector.

    It is transformers' own where that computes the same (see `stock.is_stock`), and else ours,
    which needs this package. Nothing is held twice, so `llm` is a part of it from then on, and a
    tower shares what needs no other form. What is drawn follows from torch's seed and the sizes of
    the connector alone. `tokenizer` is that of `llms`; where it has more tokens than the LLM,
    the LLM's embeddings grow. UsageError for a connector that cannot serve the tower's grid.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    options, width = dict(options or {}), llm.config.hidden_size
    with torch.device("meta"):
        num_tokens = build_connector(connector, tower.hidden_size, width, **options).num_tokens(
            tower.grid
        )
    common = {
        "vision_config": vision_config(tower),
        "text_config": llm.config,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "vision_feature_layer": said_layers(tower),
        "vision_feature_select_strategy": STRATEGIES.get(tower.kind, "full"),
        "image_seq_length": num_tokens,
        "tie_word_embeddings": llm.config.tie_word_embeddings,
    }
    kind: Any = LlavaForConditionalGeneration
    config = LlavaConfig(**common)
    if not is_stock(tower, connector, options):
        from aimv2_mllm.model.llava import AnyLlava, AnyLlavaConfig

        ours = {
            "tower": tower.kind,
            "vision_feature_norm": tower.norm,
            "connector": {"name": connector, **options},
        }
        kind, config = AnyLlava, AnyLlavaConfig(**common, **ours)
    with torch.device("meta"):
        model = kind(config)
    draw_connector(model)
    take_weights(model.model.vision_tower, tower_state(tower))
    assert type(model.model.language_model) is type(llm.base_model), type(llm.base_model)
    model.model.language_model, model.lm_head = llm.base_model, llm.get_output_embeddings()
    if len(tokenizer) > model.lm_head.weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    model.config.text_config.name_or_path = ""  # a path of this machine
    model.generation_config = ended_by(llm.generation_config)
    return model.train()


def ended_by(settings: Any, end: int | None = None) -> Any:
    """The generation `settings` of an LLM in which the token `end` ends an answer too, and without
    how it is to be sampled, which was of its own answers."""
    from transformers import GenerationConfig

    known = settings.eos_token_id
    ends = [*known] if isinstance(known, list) else [known]
    ends = [one for one in dict.fromkeys((*ends, end)) if one is not None]
    return GenerationConfig(
        bos_token_id=settings.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else next(iter(ends), None),
        pad_token_id=settings.pad_token_id,
    )


def build_processor(model: Any, tokenizer: Any, preprocessing: Preprocessing) -> "LlavaProcessor":
    """The processor that belongs to an assembled `model`: pictures by Pillow alone, text by the
    LLM's tokenizer."""
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    config, patch_size = model.config, side_of(model.config.vision_config.patch_size)
    words = {
        "tokenizer": tokenizer,
        "patch_size": patch_size,
        "chat_template": tokenizer.chat_template,
        "image_token": IMAGE_TOKEN,
    }
    if config.model_type == "llava":
        strategy = config.vision_feature_select_strategy
        return LlavaProcessor(
            CLIPImageProcessorPil(**preprocessing.settings()),
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=int(strategy == "default"),
            **words,
        )
    from aimv2_mllm.model.llava import AnyLlavaProcessor, NativeImageProcessor

    layers = config.vision_feature_layer
    connector = {
        **config.connector,
        "in_features": config.vision_config.hidden_size
        * (1 if isinstance(layers, int) else len(layers)),
        "out_features": config.text_config.hidden_size,
    }
    pictures = CLIPImageProcessorPil(**preprocessing.settings())
    if getattr(config.vision_config, "is_native", False):
        settings = {**preprocessing.settings(), "do_center_crop": False}
        unit = config.connector.get("factor") or 1
        pictures = NativeImageProcessor(**settings, patch_size=patch_size, unit=unit)
    return AnyLlavaProcessor(pictures, connector=connector, **words)


def load_llava(source: str | Path, dtype: Any = torch.float32) -> tuple[Any, Any]:
    """The Llava in a folder or of a hub id, transformers' own or ours, in `dtype` ("auto": as it is
    stored), and its processor; UsageError if there is none, or not all of it."""
    llava_config(source)
    refusal, here = "no Llava can be loaded from there", torch.get_default_device()
    name, words = pinned(source)
    model, processor = load_image_text(name, refusal, dtype=dtype, device=here, **words)
    forget_how_it_was_loaded(processor.tokenizer)
    return model, processor


def llava_config(source: str | Path) -> Any:
    """The configuration of the Llava in a folder or of a hub id; UsageError if it is none."""
    from transformers import AutoConfig

    import aimv2_mllm.model.llava

    name, words = pinned(source)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **words)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{source}: no Llava can be loaded from there ({first_line(error)})"
        ) from None
    known = ("llava", aimv2_mllm.model.llava.MODEL_TYPE)
    if config.model_type not in known:
        raise UsageError(
            f"{source}: its model_type is {config.model_type}, and must be {' or '.join(known)}"
        )
    return config


@contextmanager
def connector_inputs(body: Any) -> Iterator[list[Tensor]]:
    """While entered, collects what the connector of the Llava `body` is given: (1, N, D) each."""
    given: list[Tensor] = []
    hook = body.multi_modal_projector.register_forward_pre_hook(
        lambda _, arguments: given.append(arguments[0])
    )
    try:
        yield given
    finally:
        hook.remove()


def pictures_of(processor: Any) -> tuple[Preprocessing, int]:
    """How a Llava's `processor` prepares a square picture, and how many tokens that becomes."""
    preprocessing = Preprocessing.read(processor.image_processor.to_dict())
    side = preprocessing.image_size // processor.patch_size
    count = getattr(processor, "num_image_tokens", None)
    return preprocessing, side**2 if count is None else count((side, side))
