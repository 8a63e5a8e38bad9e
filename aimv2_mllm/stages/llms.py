"""The stages that make a model talk: a connector aligned, and a small LLM from nothing."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aimv2_mllm.data.drawing import Skipped
from aimv2_mllm.data.pairs.batches import world_seed
from aimv2_mllm.data.pictures.own_shapes import OwnShapes, demand_native
from aimv2_mllm.data.talks.batches import TalkBatches, conversation_batches
from aimv2_mllm.data.talks.corpus import TalkCorpus
from aimv2_mllm.data.talks.settled import settled
from aimv2_mllm.data.talks.templates import V1_CHAT_TEMPLATE, Writer
from aimv2_mllm.data.talks.tokenizer import train_tokenizer
from aimv2_mllm.engine.optimizer import Parts
from aimv2_mllm.engine.precision import held_dtype
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model import adapting, llms, mllm
from aimv2_mllm.model.answering import Answering
from aimv2_mllm.model.connectors import build_connector
from aimv2_mllm.model.encoder import SIZES
from aimv2_mllm.model.grids import Grid
from aimv2_mllm.model.shards import PRECISIONS
from aimv2_mllm.model.towers import load_tower
from aimv2_mllm.objective import AnswerObjective
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.connectors import MlpChoice
from aimv2_mllm.recipe.data import ConversationData
from aimv2_mllm.recipe.stages import PATCH, AlignStage, LanguageStage, PretrainStage
from aimv2_mllm.recipe.tune import TuneStage
from aimv2_mllm.stages.feature_pass import keep_features
from aimv2_mllm.stages.job import DataFacts, Job, named_parts

TOKENIZER_TEXTS = 3000  # conversations from which a tokenizer is learned
SHORT_TALK = 16  # tokens of a question with a short answer, and of what a template puts around them


def build_align(stage: AlignStage, place: Place) -> Job:
    """A Llava of a frozen tower and a frozen LLM, with the connector between them trained."""
    model, processor = assembled(stage, place)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    adapting.hold(model, held_dtype(stage.train, place.has_bf16))
    parts = named_parts(model, {"connector": (adapting.CONNECTOR,)})
    result = adapting.Result(model, PRECISIONS[stage.train.precision])
    return conversation_job(model, parts, stage, place, processor, result)


def assembled(stage: AlignStage | TuneStage, place: Place) -> tuple[Any, Any]:
    """A Llava of the stage's tower, its LLM and a new connector, and its processor."""
    llm, choice = place.source(str(stage.llm)), stage.connector or MlpChoice()
    tower = load_tower(place.source(str(stage.tower)))
    tokenizer = load_talker(llm, stage.data)
    model = mllm.assemble(
        tower,
        llms.load_llm(llm, held_dtype(stage.train, place.has_bf16)),
        tokenizer,
        connector=choice.name,
        options=choice.options(),
    )
    processor = mllm.build_processor(model, tokenizer, tower.preprocessing)
    let_talk(model, processor, stage.data)
    return model, processor


def load_talker(llm: str, data: ConversationData) -> Any:
    """The tokenizer of `llm` with the chat template by which one talks to what is trained on
    `data`; UsageError where it has none."""
    own = None if data.template == "chat" else V1_CHAT_TEMPLATE
    tokenizer = llms.load_tokenizer(llm, chat_template=own)
    tokenizer.chat_template = _chat_template(tokenizer, data)
    return tokenizer


def _chat_template(tokenizer: Any, data: ConversationData) -> str:
    return V1_CHAT_TEMPLATE if data.template == "v1" else settled(tokenizer)


def let_talk(model: Any, processor: Any, data: ConversationData) -> None:
    """Give a Llava and its processor what makes them talk as training on `data` does: the chat
    template, and the token that ends an answer."""
    tokenizer = processor.tokenizer
    # Older folders have the template with the processor alone.
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    processor.chat_template = tokenizer.chat_template = _chat_template(tokenizer, data)
    end = Writer(tokenizer, data.template).end
    model.generation_config = mllm.ended_by(model.generation_config, end)


def conversation_job(
    model: nn.Module,
    parts: Parts,
    stage: AlignStage | TuneStage,
    place: Place,
    processor: Any,
    result: adapting.Result,
) -> Job:
    """The stage that trains `parts` of the Llava `model`, and leaves `result` and `processor`."""
    preprocessing, num_image_tokens = mllm.pictures_of(processor)

    def save(folder: Path) -> None:
        result.save(folder)
        processor.save_pretrained(folder)

    llava: Any = model
    shapes = OwnShapes.of(processor) if stage.data.image_aspect == "native" else None
    most = min(stage.data.max_tokens, llms.room_of(llava.config.text_config))
    batches = conversation_batches(
        stage.data.model_copy(update={"max_tokens": most}),
        stage.train,
        seed=place.recipe.seed,
        tokenizer=processor.tokenizer,
        preprocessing=preprocessing,
        num_image_tokens=num_image_tokens,
        shapes=shapes,
        share=place.share,
    )
    inside = {part: [(f"llava.{n}", p) for n, p in named] for part, named in parts.items()}
    facts = _facts(stage, batches)
    job = Job(Answering(model), inside, AnswerObjective(), batches, save, facts)
    if stage.data.features is not None:
        job.prepare = partial(keep_features, llava=model, data=stage.data, train=stage.train)
    return job


def build_language(stage: LanguageStage, place: Place) -> Job:
    """A Llama and its tokenizer from nothing, trained on conversations about sheets that are
    described in words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    seed = world_seed(place.recipe.seed, stage.data)
    corpus, skipped = TalkCorpus(stage.data, seed, None), Skipped()
    talks = (corpus.words(number, skipped) for number in range(TOKENIZER_TEXTS))
    texts = (f" {message['content'][-1]['text']}" for talk in talks for message in talk)
    longest = stage.model.max_position_embeddings
    tokenizer = train_tokenizer(texts, stage.vocab_size, longest=longest)
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
    return DataFacts(
        stage.data.workers, stage.data.max_skipped, corpus.digest, corpus.notes, corpus.num_rows
    )


def check_align(stage: AlignStage, place: Place) -> None:
    """UsageError for a tower, a connector or an LLM that the stage cannot begin with."""
    check_connector(stage, place)
    if stage.llm not in place.recipe.stages:
        Writer(load_talker(stage.llm, stage.data), stage.data.template)


def check_connector(stage: AlignStage | TuneStage, place: Place) -> None:
    """UsageError unless the stage's tower can be loaded, where it comes from outside, and its
    connector serves the grid of that tower and the width of the LLM, which has room for that."""
    check_aspect(stage, str(stage.tower), place)
    grid, width, _ = tower_sizes(str(stage.tower), place)
    read = place.recipe.stages.get(str(stage.llm))
    if isinstance(read, LanguageStage):
        out, room = read.model.hidden_size, read.model.max_position_embeddings
    else:
        out, room = llms.sizes_of(str(stage.llm))
    choice = stage.connector or MlpChoice()
    with torch.device("meta"):
        connector = build_connector(choice.name, width, out, **choice.options())
    count = connector.num_tokens(grid)
    if count + SHORT_TALK > room:
        raise UsageError(
            f"llm: {stage.llm} has room for {room:,} tokens (max_position_embeddings), and a"
            f" picture becomes {count:,}, which leaves none for a question and its answer: choose"
            " a connector that makes fewer (pixel_shuffle, average_pool, resampler), a tower for"
            " smaller pictures, or another LLM"
        )


def check_aspect(stage: AlignStage | TuneStage, tower: str, place: Place) -> None:
    """UsageError where the stage's pictures shall keep their shape, and the tower called `tower`
    takes squares alone."""
    if stage.data.image_aspect == "native":
        see = place.recipe.stages.get(tower)
        if isinstance(see, PretrainStage):
            demand_native(see.encoder.native, see.encoder.image_size)
        else:
            preprocessing = load_tower(tower).preprocessing
            demand_native(preprocessing.native, preprocessing.image_size)


def tower_sizes(name: str, place: Place) -> tuple[Grid, int, int]:
    """The grid of patches, the width and the number of blocks of the tower called `name`."""
    see = place.recipe.stages.get(name)
    if isinstance(see, PretrainStage):
        side, sizes = see.encoder.image_size // PATCH, SIZES[see.encoder.size]
        return (side, side), sizes["hidden_size"], sizes["num_hidden_layers"]
    tower = load_tower(name)
    return tower.grid, tower.hidden_size, int(tower.config.num_hidden_layers)
