"""One table: what each kind of stage builds, what it trains, and how its result is written.

`run.py` trains whatever a row of `STAGES` builds; nothing else knows which stage it is.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from aimv2_mllm.data import scenes
from aimv2_mllm.data.batches import caption_batches, conversation_batches, world_seed
from aimv2_mllm.data.conversations import conversation
from aimv2_mllm.data.tokenizer import train_tokenizer
from aimv2_mllm.engine.optimizer import Parts
from aimv2_mllm.errors import UsageError, nearest
from aimv2_mllm.model import mllm
from aimv2_mllm.model.encoder import SIZES, AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.hub import locate
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, DecoderConfig
from aimv2_mllm.model.weights import load_encoder, save_encoder
from aimv2_mllm.objective import AnswerObjective, PreTrainingObjective
from aimv2_mllm.recipe import AlignStage, LanguageStage, PretrainStage, Recipe, Stage, TuneStage

DECODER_FILE = "decoder.safetensors"
TOKENIZER_TEXTS = 3000  # conversations from which a tokenizer is learned


@dataclass(frozen=True)
class Place:
    """Where a stage stands: the whole recipe and the run folder with the results of the stages
    before it."""

    recipe: Recipe
    folder: Path

    def result(self, stage: str) -> Path:
        """The folder with the result of the stage of that name."""
        return self.folder / stage / "model"

    def source(self, name: str) -> str:
        """Where the model called `name` lies: a stage's result, or outside of the recipe as
        given."""
        return str(self.result(name)) if name in self.recipe.stages else name


@dataclass
class Job:
    """A stage ready to be trained: a model, its trainable parts by name, what is minimised, on
    which batches.

    `save` writes the result into a folder; it may change the model, for nothing comes after it.
    """

    model: nn.Module
    parts: Parts
    objective: Any
    batches: Callable[[int], list[Any]]
    save: Callable[[Path], None]

    def table(self) -> list[tuple[str, int, bool]]:
        """The parts of the model as (name, number of parameters, trainable or not)."""
        trained = {id(p): part for part, named in self.parts.items() for _, p in named}
        counts: dict[tuple[str, bool], int] = {}
        for name, parameter in self.model.named_parameters():
            part = trained.get(id(parameter), _frozen_part(name))
            key = (part, id(parameter) in trained)
            counts[key] = counts.get(key, 0) + parameter.numel()
        return [(part, count, trainable) for (part, trainable), count in counts.items()]


def inputs(stage: Stage, place: Place) -> list[str]:
    """The names of the models that the stage takes from outside of its recipe."""
    given = [getattr(stage, key, None) for key in ("tokenizer", "tower", "llm")]
    return [name for name in given if name is not None and name not in place.recipe.stages]


def check_inputs(place: Place) -> None:
    """UsageError for a model from outside, or a layer of it, that a stage will not find.

    Said before the first stage is trained, since it would cost that stage's time later.
    """
    for name, stage in place.recipe.stages.items():
        try:
            if isinstance(stage, AlignStage) and stage.tower not in place.recipe.stages:
                load_encoder(stage.tower)
            for source in inputs(stage, place):
                if source != getattr(stage, "tower", None):
                    mllm.load_tokenizer(source)
            if isinstance(stage, TuneStage):
                start = place.recipe.stages[stage.start]
                assert isinstance(start, AlignStage), start
                if start.llm not in place.recipe.stages:
                    _check_targets(stage.lora.targets, mllm.layer_names(start.llm))
        except UsageError as error:
            raise UsageError(f"stage {name}: {error}") from None


def _check_targets(targets: list[str], layers: list[str]) -> None:
    unknown = [target for target in targets if target not in layers]
    if unknown:
        raise UsageError(
            f"lora.targets: the LLM has no {', '.join(unknown)}; its layers are "
            f"{', '.join(layers)}{nearest(unknown[0], layers)}"
        )


def _frozen_part(name: str) -> str:
    parts = {
        "vision_tower": "tower",
        "multi_modal_projector": "connector",
        "language_model": "LLM",
        "lm_head": "LLM",
    }
    return next((part for word, part in parts.items() if word in name.split(".")), "model")


def _part(model: nn.Module, *prefixes: str) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if name.startswith(prefixes)]


def build_pretrain(stage: PretrainStage, place: Place) -> Job:
    """The encoder under prefix attention and its multimodal decoder, both trained."""
    tokenizer = mllm.load_tokenizer(place.source(stage.tokenizer))
    choice = stage.encoder
    config = EncoderConfig(**SIZES[choice.size], image_size=choice.image_size, native=choice.native)
    decoder = DecoderConfig(**stage.decoder.model_dump(), vocab_size=len(tokenizer))
    model = AIMv2ForPreTraining(AIMv2Encoder(config), decoder)
    preprocessing = Preprocessing(choice.image_size)

    def save(folder: Path) -> None:
        save_encoder(model.encoder, folder)
        preprocessing.save(folder)
        tokenizer.save_pretrained(folder)
        rest = {
            k: v.detach() for k, v in model.state_dict().items() if not k.startswith("encoder.")
        }
        save_file(rest, folder / DECODER_FILE, metadata={"decoder": json.dumps(asdict(decoder))})

    return Job(
        model,
        {
            "encoder": _part(model, "encoder."),
            "decoder": [
                (n, p) for n, p in model.named_parameters() if not n.startswith("encoder.")
            ],
        },
        PreTrainingObjective(config.patch_size, tokenizer.eos_token_id, stage.alpha),
        caption_batches(
            stage.data,
            stage.train,
            seed=place.recipe.seed,
            tokenizer=tokenizer,
            preprocessing=preprocessing,
            num_patches=config.num_patches,
            max_text_tokens=decoder.max_text_tokens,
        ),
        save,
    )


def build_align(stage: AlignStage, place: Place) -> Job:
    """A Llava of a frozen tower and a frozen LLM, with the connector between them trained."""
    tower, llm = locate(place.source(stage.tower)), place.source(stage.llm)
    tokenizer = mllm.load_tokenizer(llm)
    model = mllm.assemble(load_encoder(tower), mllm.load_llm(llm), tokenizer)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    processor = mllm.build_processor(
        tokenizer, Preprocessing.load(tower), model.config.vision_config.patch_size
    )
    parts = {"connector": _part(model, "model.multi_modal_projector.")}
    return _conversation_job(model, parts, stage, place, processor, lambda: model)


def build_tune(stage: TuneStage, place: Place) -> Job:
    """The aligned Llava with low-rank adapters on the LLM; adapters and connector are trained, the
    rest frozen.

    The result has the adapters merged in: it is as stock a folder as the aligned one.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    start = place.result(stage.start)
    base = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(start)
    _check_targets(stage.lora.targets, mllm.linear_layers(base.model.language_model))
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
    parts = {
        "lora": [(n, p) for n, p in model.named_parameters() if "lora_" in n],
        "connector": [(n, p) for n, p in model.named_parameters() if "multi_modal_projector" in n],
    }
    return _conversation_job(model, parts, stage, place, processor, model.merge_and_unload)


def _conversation_job(
    model: nn.Module,
    parts: Parts,
    stage: AlignStage | TuneStage,
    place: Place,
    processor: Any,
    finished: Callable[[], Any],
) -> Job:
    pictures = processor.image_processor
    preprocessing = Preprocessing(
        pictures.crop_size["height"], tuple(pictures.image_mean), tuple(pictures.image_std)
    )

    def save(folder: Path) -> None:
        finished().save_pretrained(folder)
        processor.save_pretrained(folder)

    batches = conversation_batches(
        stage.data,
        stage.train,
        seed=place.recipe.seed,
        tokenizer=processor.tokenizer,
        preprocessing=preprocessing,
        num_image_tokens=(preprocessing.image_size // processor.patch_size) ** 2,
    )
    return Job(model, parts, AnswerObjective(), batches, save)


def build_language(stage: LanguageStage, place: Place) -> Job:
    """A Llama and its tokenizer from nothing, trained on conversations about sheets that are
    described in words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    seed = world_seed(place.recipe.seed, stage.data)
    tasks = {str(task): weight for task, weight in stage.data.tasks.items()}
    talks = (
        conversation(
            scenes.scene(seed, "train", i),
            scenes.generator(seed, "words", i),
            tasks=tasks,
            turns=4,
            seen=False,
        )
        for i in range(TOKENIZER_TEXTS)
    )
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
        stage.data, stage.train, seed=place.recipe.seed, tokenizer=tokenizer, preprocessing=None
    )
    return Job(model, {"llm": list(model.named_parameters())}, AnswerObjective(), batches, save)


@dataclass(frozen=True)
class StageKind:
    """A row of the table: how the stage is built, and what of it is trained, in words."""

    build: Callable[[Any, Place], Job]
    trains: str


STAGES: dict[str, StageKind] = {
    "pretrain": StageKind(build_pretrain, "encoder and decoder"),
    "align": StageKind(build_align, "connector"),
    "tune": StageKind(build_tune, "LoRA on the LLM, and connector"),
    "language": StageKind(build_language, "LLM"),
}
