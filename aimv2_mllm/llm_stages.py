"""The stages whose models talk: a connector aligned, an LLM tuned, and a small LLM from nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aimv2_mllm.data.batches import world_seed
from aimv2_mllm.data.drawing import Skipped
from aimv2_mllm.data.talk_batches import TalkBatches, conversation_batches
from aimv2_mllm.data.talks import TalkCorpus
from aimv2_mllm.data.templates import V1_CHAT_TEMPLATE
from aimv2_mllm.data.tokenizer import train_tokenizer
from aimv2_mllm.engine.optimizer import Parts
from aimv2_mllm.errors import UsageError, nearest
from aimv2_mllm.job import DataFacts, Job, Place, named_parts
from aimv2_mllm.model import mllm
from aimv2_mllm.model.answering import Answering
from aimv2_mllm.model.connectors import build_connector
from aimv2_mllm.model.encoder import SIZES
from aimv2_mllm.model.towers import load_tower
from aimv2_mllm.objective import AnswerObjective
from aimv2_mllm.recipe_data import ConversationData
from aimv2_mllm.recipe_stages import PATCH, AlignStage, LanguageStage, PretrainStage, TuneStage

TOKENIZER_TEXTS = 3000  # conversations from which a tokenizer is learned


def build_align(stage: AlignStage, place: Place) -> Job:
    """A Llava of a frozen tower and a frozen LLM, with the connector between them trained."""
    llm = place.source(stage.llm)
    tower, tokenizer = load_tower(place.source(stage.tower)), load_talker(llm, stage.data)
    model = mllm.assemble(
        tower,
        mllm.load_llm(llm),
        tokenizer,
        connector=stage.connector.name,
        options=stage.connector.options(),
    )
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    processor = mllm.build_processor(model, tokenizer, tower.preprocessing)
    answering = Answering(model)
    parts = named_parts(answering, {"connector": ("llava.model.multi_modal_projector.",)})
    return _conversation_job(answering, parts, stage, place, processor, lambda: model)


def load_talker(llm: str, data: ConversationData) -> Any:
    """The tokenizer of `llm` with the chat template by which one talks to what is trained on
    `data`; UsageError where it has none."""
    own = None if data.template == "chat" else V1_CHAT_TEMPLATE
    tokenizer = mllm.load_tokenizer(llm, chat_template=own)
    if data.template == "v1":
        tokenizer.chat_template = V1_CHAT_TEMPLATE
    return tokenizer


def build_tune(stage: TuneStage, place: Place) -> Job:
    """The aligned Llava with low-rank adapters on the LLM; adapters and connector are trained, the
    rest frozen.

    The result has the adapters merged in: it is as stock a folder as the aligned one.
    """
    from peft import LoraConfig, get_peft_model

    base, processor = mllm.load_llava(place.result(stage.start))
    if stage.data.template == "v1":
        processor.chat_template = processor.tokenizer.chat_template = V1_CHAT_TEMPLATE
    check_targets(stage.lora.targets, mllm.linear_layers(base.model.language_model))
    targets = "|".join(stage.lora.targets)
    config = LoraConfig(
        r=stage.lora.r,
        lora_alpha=stage.lora.alpha,
        lora_dropout=stage.lora.dropout,
        # Whole names: the tower may have the same leaf names.
        target_modules=rf".*\.language_model\..*\.({targets})",
    )
    model = get_peft_model(base, config)
    base.model.multi_modal_projector.requires_grad_(True)
    answering = Answering(model)
    named = list(answering.named_parameters())
    parts = {
        "lora": [(n, p) for n, p in named if "lora_" in n],
        "connector": [(n, p) for n, p in named if "multi_modal_projector" in n],
    }
    return _conversation_job(answering, parts, stage, place, processor, model.merge_and_unload)


def _conversation_job(
    model: nn.Module,
    parts: Parts,
    stage: AlignStage | TuneStage,
    place: Place,
    processor: Any,
    finished: Callable[[], Any],
) -> Job:
    preprocessing, num_image_tokens = mllm.pictures_of(processor)

    def save(folder: Path) -> None:
        finished().save_pretrained(folder)
        processor.save_pretrained(folder)

    batches = conversation_batches(
        stage.data,
        stage.train,
        seed=place.recipe.seed,
        tokenizer=processor.tokenizer,
        preprocessing=preprocessing,
        num_image_tokens=num_image_tokens,
        share=place.share,
    )
    return Job(model, parts, AnswerObjective(), batches, save, _facts(stage, batches))


def build_language(stage: LanguageStage, place: Place) -> Job:
    """A Llama and its tokenizer from nothing, trained on conversations about sheets that are
    described in words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    seed = world_seed(place.recipe.seed, stage.data)
    corpus, skipped = TalkCorpus(stage.data, seed, None), Skipped()
    talks = (corpus.words(number, skipped) for number in range(TOKENIZER_TEXTS))
    texts = (f" {message['content'][-1]['text']}" for talk in talks for message in talk)
    tokenizer = train_tokenizer(texts, stage.vocab_size)
    config = LlamaConfig(
        **stage.model.model_dump(),
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        initializer_range=stage.model.hidden_size**-0.5,  # the default, 0.02, is for large widths
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    batches = conversation_batches(
        stage.data,
        stage.train,
        seed=place.recipe.seed,
        tokenizer=tokenizer,
        preprocessing=None,
        share=place.share,
    )
    answering = Answering(model)
    parts = {"llm": list(answering.named_parameters())}
    return Job(answering, parts, AnswerObjective(), batches, save, _facts(stage, batches))


def _facts(stage: AlignStage | TuneStage | LanguageStage, batches: TalkBatches) -> DataFacts:
    corpus = batches.corpus
    return DataFacts(stage.data.workers, stage.data.max_skipped, corpus.digest, corpus.notes)


def check_connector(stage: AlignStage, place: Place) -> None:
    """UsageError unless the stage's tower can be loaded, where it comes from outside, and its
    connector serves the grid of that tower and the width of the LLM."""
    stages = place.recipe.stages
    if stage.tower in stages:
        see = stages[stage.tower]
        assert isinstance(see, PretrainStage), see
        side, width = see.encoder.image_size // PATCH, SIZES[see.encoder.size]["hidden_size"]
        grid = (side, side)
    else:
        tower = load_tower(stage.tower)
        grid, width = tower.grid, tower.hidden_size
    read = stages.get(stage.llm)
    out = read.model.hidden_size if isinstance(read, LanguageStage) else mllm.width_of(stage.llm)
    with torch.device("meta"):
        options = stage.connector.options()
        connector = build_connector(stage.connector.name, width, out, **options)
    connector.num_tokens(grid)


def check_targets(targets: list[str], layers: list[str]) -> None:
    """UsageError for a name in `lora.targets` that none of the LLM's `layers` has."""
    unknown = [target for target in targets if target not in layers]
    if unknown:
        raise UsageError(
            f"lora.targets: the LLM has no {', '.join(unknown)}; its layers are "
            f"{', '.join(layers)}{nearest(unknown[0], layers)}"
        )
