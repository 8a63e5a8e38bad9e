"""What a recipe may say: the schema of a run and its stages, typed, strict, printable.

`recipe_file` reads it. Refuses unknown keys, wrong types, values out of range, and references to
stages that do not come earlier. Whether a named folder or model exists is not looked up here: a
recipe means the same on every machine.
"""

import contextlib
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from aimv2_mllm.errors import nearest, show
from aimv2_mllm.recipe_data import CaptionData, ConversationData
from aimv2_mllm.recipe_types import Count, FolderName, Number, Section, Seed, Switch, Text

# Keys of a stage's sections that say how and not what is computed: a run may go on under others.
EXECUTION_KEYS = {
    "train": frozenset(
        {
            "micro_batch_size",
            "device",
            "strategy",
            "activation_checkpointing",
            "compile",
            "checkpoint_every",
            "keep_checkpoints",
            "trackers",
        }
    ),
    "data": frozenset({"workers", "cache", "cache_gib"}),
}

Place = tuple[str, ...]  # the keys that lead to a value, outermost first
Mistake = tuple[Place, str]


class TrainConfig(Section):
    """How a stage is optimised: AdamW, linear warm-up, cosine decay.

    betas, eps and clip are by default those AIMv2 was pre-trained with.
    """

    steps: Count = Field(description="optimiser steps in all")
    batch_size: Count = Field(description="samples per optimiser step, over all devices")
    micro_batch_size: Count | None = Field(
        default=None,
        description="samples per forward pass on a device, at most batch_size; null: all of them",
    )
    lr: Number = Field(gt=0, description="peak learning rate")
    final_lr: Number = Field(default=0.0, ge=0, description="learning rate after the last step")
    warmup_steps: int = Field(default=0, ge=0, description="steps of warm-up, fewer than steps")
    warmup_lr: Number = Field(default=0.0, ge=0, description="learning rate of the first step")
    part_lr: dict[Text, Annotated[Number, Field(gt=0)]] = Field(
        default={}, description="peak learning rates of single parts of the model, by part"
    )
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = (
        Field(
            default=(0.9, 0.95), strict=False, description="AdamW's two decay rates, each in [0, 1)"
        )
    )
    eps: Number = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: Number = Field(default=0.0, ge=0, description="decay per step, times lr")
    clip: Number = Field(default=1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="arithmetic; the weights are fp32 either way"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where it is trained; auto: cuda if there is one"
    )
    strategy: Literal["auto", "ddp", "fsdp2"] = Field(
        default="auto", description="how several processes share it; auto: ddp"
    )
    activation_checkpointing: Switch = Field(
        default=False, description="compute activations twice and keep fewer of them"
    )
    compile: Switch = Field(default=False, description="torch.compile for every block")
    log_every: Count = Field(default=10, description="steps from one line of metrics to the next")
    checkpoint_every: Count = Field(
        default=100, description="steps from one checkpoint to the next"
    )
    keep_checkpoints: Count = Field(default=2, description="newest checkpoints that are kept")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default=[], description="where the lines of metrics go besides metrics.jsonl"
    )

    @field_validator("micro_batch_size")
    @classmethod
    def _fits_the_batch(cls, value: int | None, info: ValidationInfo) -> int | None:
        batch = info.data.get("batch_size")  # absent when it is itself a mistake
        if value and batch and value > batch:
            raise ValueError(f"must be at most batch_size, which is {batch}")
        return value

    @field_validator("warmup_steps")
    @classmethod
    def _ends_before_the_last_step(cls, value: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps and value >= steps:
            raise ValueError(f"must be less than steps, which is {steps}")
        return value


class EncoderChoice(Section):
    """The encoder to pre-train."""

    size: Literal[
        "aimv2_nano", "aimv2_base", "aimv2_large", "aimv2_huge", "aimv2_1b", "aimv2_3b"
    ] = Field(description="named size of the encoder")
    image_size: int = Field(
        ge=28, le=4096, multiple_of=14, description="side of the image, pixels, 28 to 4096"
    )
    native: Switch = Field(default=False, description="positions for any grid of patches")


class _Attention(Section):
    hidden_size: Count = Field(description="width, channels")
    intermediate_size: Count = Field(description="width inside SwiGLU, channels")
    num_hidden_layers: Count = Field(description="depth, blocks")
    num_attention_heads: Count = Field(description="heads, a divisor of hidden_size")

    @field_validator("num_attention_heads")
    @classmethod
    def _divides_the_width(cls, value: int, info: ValidationInfo) -> int:
        width = info.data.get("hidden_size")
        if width and width % value:
            raise ValueError(f"must divide hidden_size, which is {width}")
        return value


class DecoderChoice(_Attention):
    """The decoder of pre-training; defaults as AIMv2 was trained."""

    hidden_size: Count = Field(default=1024, description="width, channels")
    intermediate_size: Count = Field(default=2816, description="width inside SwiGLU, channels")
    num_hidden_layers: Count = Field(default=12, description="depth, blocks")
    num_attention_heads: Count = Field(default=8, description="heads, a divisor of hidden_size")
    max_text_tokens: Count = Field(default=77, description="longest caption, tokens")


class StartChoice(Section):
    """The weights to go on from; what is not named starts from random ones.

    Sizes must be those of the stage. Learned positions are resized where image_size differs.
    """

    encoder: Text | None = Field(
        default=None, description="an earlier pretrain stage, a folder or a hub id"
    )
    decoder: Text | None = Field(
        default=None, description="an earlier pretrain stage, or the folder of its result"
    )


class TextTowerChoice(_Attention):
    """The text tower of LiT; defaults as the released one."""

    hidden_size: Count = Field(default=768, description="width, channels")
    intermediate_size: Count = Field(default=2048, description="width inside SwiGLU, channels")
    num_hidden_layers: Count = Field(default=12, description="depth, blocks")
    num_attention_heads: Count = Field(default=6, description="heads, a divisor of hidden_size")
    max_position_embeddings: int = Field(default=77, ge=2, description="longest caption, tokens")


class LanguageChoice(_Attention):
    """A Llama, by its sizes."""

    num_key_value_heads: Count = Field(description="a divisor of num_attention_heads")
    head_dim: Count | None = Field(
        default=None, description="channels of a head; null: hidden_size / num_attention_heads"
    )
    max_position_embeddings: Count = Field(description="longest sequence, tokens")

    @field_validator("num_key_value_heads")
    @classmethod
    def _divides_the_heads(cls, value: int, info: ValidationInfo) -> int:
        heads = info.data.get("num_attention_heads")
        if heads and heads % value:
            raise ValueError(f"must divide num_attention_heads, which is {heads}")
        return value


class LoraChoice(Section):
    """Which linear layers of the LLM get low-rank adapters, and how large these are."""

    r: Count = Field(default=8, description="rank of the adapters")
    alpha: Number = Field(default=16.0, gt=0, description="scale of the adapters, divided by r")
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="share dropped, in [0, 1)")
    targets: list[Text] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="names of the adapted linear layers",
    )


class _Stage(Section):
    PARTS: ClassVar[tuple[str, ...]]  # what is trained, by the names that part_lr may have

    @field_validator("train", check_fields=False)
    @classmethod
    def _names_parts_of_the_stage(cls, value: TrainConfig) -> TrainConfig:
        unknown = [part for part in value.part_lr if part not in cls.PARTS]
        if unknown:
            known = f"{', '.join(cls.PARTS)}{nearest(unknown[0], cls.PARTS)}"
            raise ValueError(f"must name in part_lr parts of the stage, which are {known}")
        return value


class PretrainStage(_Stage):
    """Pre-trains an encoder on pictures and captions."""

    PARTS = ("encoder", "decoder")
    kind: Literal["pretrain"] = Field(default="pretrain", description="the kind of the stage")
    data: CaptionData = Field(default=CaptionData(), description="the samples")
    encoder: EncoderChoice = Field(description="the encoder to pre-train")
    decoder: DecoderChoice = Field(default=DecoderChoice(), description="used here only")
    tokenizer: Text = Field(description="tiny_llm, an earlier language stage, a folder or a hub id")
    start: StartChoice = Field(default=StartChoice(), description="the weights to go on from")
    alpha: Number = Field(
        default=0.4, ge=0, description="weight of the image loss; 0: captions alone"
    )
    text_weight: Number = Field(
        default=1.0, ge=0, description="weight of the caption loss; 0: pictures alone, as in AIM"
    )
    prefix: Literal["uniform", "full"] = Field(
        default="uniform",
        description="length of the visible prefix; full: bidirectional attention, for alpha 0",
    )
    train: TrainConfig = Field(description="how it is optimised")

    @field_validator("text_weight")
    @classmethod
    def _something_is_learned(cls, value: float, info: ValidationInfo) -> float:
        if value == 0 and info.data.get("alpha") == 0:
            raise ValueError("must be above 0 where alpha is 0: nothing would be learned")
        return value

    @field_validator("prefix")
    @classmethod
    def _no_patch_is_scored_that_was_seen(cls, value: str, info: ValidationInfo) -> str:
        if value == "full" and info.data.get("alpha"):
            raise ValueError(
                "must be uniform where alpha is above 0: full hides no patch to predict"
            )
        return value


class LitStage(_Stage):
    """Trains a text tower and a pooling head beside a frozen encoder (LiT), for zero-shot use."""

    PARTS = ("head", "text")
    kind: Literal["lit"] = Field(default="lit", description="the kind of the stage")
    tower: Text = Field(description="an earlier pretrain stage, a folder or a hub id")
    text: TextTowerChoice = Field(default=TextTowerChoice(), description="the text tower")
    projection_dim: Count = Field(default=768, description="width of the joint space, channels")
    tokenizer: Text = Field(description="tiny_llm, an earlier language stage, a folder or a hub id")
    data: CaptionData = Field(default=CaptionData(), description="the samples")
    train: TrainConfig = Field(
        description="how it is optimised; contrasts are within a micro-batch"
    )


class AlignStage(_Stage):
    """Trains a connector from a frozen tower to a frozen LLM."""

    PARTS = ("connector",)
    kind: Literal["align"] = Field(default="align", description="the kind of the stage")
    tower: Text = Field(
        description="an earlier pretrain stage, or a folder or hub id of an AIMv2 encoder"
    )
    llm: Text = Field(description="tiny_llm, an earlier language stage, a folder or a hub id")
    connector: Literal["mlp"] = Field(default="mlp", description="named connector")
    data: ConversationData = Field(default=ConversationData(), description="the samples")
    train: TrainConfig = Field(description="how it is optimised")


class TuneStage(_Stage):
    """Tunes the LLM of an aligned model with adapters."""

    PARTS = ("lora", "connector")
    kind: Literal["tune"] = Field(default="tune", description="the kind of the stage")
    start: Text = Field(description="an earlier align stage, whose result is tuned")
    lora: LoraChoice = Field(default=LoraChoice(), description="the adapters")
    data: ConversationData = Field(default=ConversationData(), description="the samples")
    train: TrainConfig = Field(description="how it is optimised")


class LanguageStage(_Stage):
    """Trains a small LLM and its tokenizer on the text of the conversations."""

    PARTS = ("llm",)
    kind: Literal["language"] = Field(default="language", description="the kind of the stage")
    model: LanguageChoice = Field(description="the LLM to train")
    vocab_size: Count = Field(description="size of the tokenizer's vocabulary, tokens")
    data: ConversationData = Field(default=ConversationData(), description="the samples")
    train: TrainConfig = Field(description="how it is optimised")


class EvaluationConfig(Section):
    """How the result of the last stage is judged."""

    questions: Count = Field(default=1200, description="questions asked")
    sheets: Count = Field(default=8, description="pictures shown in the report")
    seed: Seed = Field(default=0, description="seed of the questions")


Stage = PretrainStage | LitStage | AlignStage | TuneStage | LanguageStage
STAGES: dict[str, type[Stage]] = {
    "pretrain": PretrainStage,
    "lit": LitStage,
    "align": AlignStage,
    "tune": TuneStage,
    "language": LanguageStage,
}
# kind of a stage -> its keys that name an earlier stage -> the kind which that stage must have
REFERENCES = {
    "pretrain": {
        "tokenizer": "language",
        "start.encoder": "pretrain",
        "start.decoder": "pretrain",
    },
    "lit": {"tower": "pretrain", "tokenizer": "language"},
    "align": {"tower": "pretrain", "llm": "language"},
    "tune": {"start": "align"},
}


class Recipe(Section):
    """A whole run: its stages in the order in which they are run, and how the result is judged."""

    name: FolderName = Field(description="name of the run: letters, digits, - and _")
    seed: Seed = Field(default=0, description="seed of the weights and of the order of samples")
    output: Path = Field(
        default_factory=lambda data: Path("runs") / data["name"],
        strict=False,
        description="the run folder; runs/NAME by default",
    )
    stages: dict[FolderName, Annotated[Stage, Field(discriminator="kind")]] = Field(
        min_length=1, description="the stages by name, in the order in which they are run"
    )
    evaluation: EvaluationConfig | None = Field(
        default=None, description="how the result is judged"
    )

    @model_validator(mode="after")
    def _references_come_earlier(self) -> Self:
        mistakes = [*reference_mistakes({k: v.model_dump() for k, v in self.stages.items()})]
        if mistakes:
            lines = "; ".join(f"{'.'.join(place)} {text}" for place, text in mistakes)
            raise PydanticCustomError("reference", "{lines}", {"lines": lines})
        return self


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML, every default written out; `load_recipe` reads it back equal."""
    plain = recipe.model_dump(mode="json")
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100))


def changed_keys(old: Recipe | Mapping[str, Any], new: Recipe) -> list[str]:
    """Return what differs, a line per key: `key: old -> new`, `key: added new`, `key: removed old`.

    A mapping that is a valid recipe counts with its defaults; another is compared as it stands.
    Where the run folder lies and how it is computed (`EXECUTION_KEYS`) is no difference.
    """
    if not isinstance(old, Recipe):
        # not a recipe: written by another version
        with contextlib.suppress(ValidationError):
            old = Recipe.model_validate(old)
    plain = old.model_dump(mode="json") if isinstance(old, Recipe) else old
    before, after = (
        dict(_leaves({**recipe, "output": None, "stages": _deciding_of_each(recipe)}))
        for recipe in (plain, new.model_dump(mode="json"))
    )
    lines = []
    for key, value in after.items():
        if key in before and before[key] != value:
            lines.append(f"{key}: {show(before[key])} -> {show(value)}")
        elif key not in before and value not in (None, {}):
            lines.append(f"{key}: added {show(value)}")
    gone = [key for key in before if key not in after and before[key] not in (None, {})]
    lines += [f"{key}: removed {show(before[key])}" for key in gone]
    was, now = list(plain.get("stages") or ()), list(new.stages)
    if was != now and set(was) == set(now):
        lines.append(f"stages: order {', '.join(was)} -> {', '.join(now)}")
    return lines


def deciding(stage: Mapping[str, Any]) -> dict[str, Any]:
    """What of a stage's plain values decides the numbers that come out of it.

    That is all but `EXECUTION_KEYS`; of a lit stage, which contrasts within a micro-batch, its size
    too.
    """
    kept = {"micro_batch_size"} if stage.get("kind") == "lit" else set()
    return {
        name: _without(section, EXECUTION_KEYS[name] - kept) if name in EXECUTION_KEYS else section
        for name, section in stage.items()
    }


def _without(plain: Any, keys: Set[str]) -> Any:
    if isinstance(plain, Mapping):
        return {key: _without(value, keys) for key, value in plain.items() if key not in keys}
    return [_without(value, keys) for value in plain] if isinstance(plain, list) else plain


def _deciding_of_each(recipe: Mapping[str, Any]) -> Any:
    stages = recipe.get("stages")
    if not isinstance(stages, Mapping):
        return stages
    return {n: deciding(s) if isinstance(s, Mapping) else s for n, s in stages.items()}


def reference_mistakes(stages: Any) -> Iterator[Mistake]:
    """The stages that name others which do not come earlier, with what is wrong.

    On plain values of any type, so that it also judges a recipe with other mistakes.
    """
    earlier: dict[str, Any] = {}
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        kind = stage.get("kind") if isinstance(stage, dict) else None
        for key, wanted in REFERENCES.get(kind if isinstance(kind, str) else "", {}).items():
            said: Any = stage
            for part in key.split("."):
                said = said.get(part) if isinstance(said, dict) else None
            names = [other for other, its_kind in earlier.items() if its_kind == wanted]
            if not isinstance(said, str) or said in names:
                continue
            # a word is a stage, for an llm also a hub id; with a / it is a folder or a hub id
            weights = key in ("tower", "start.encoder", "start.decoder")
            if (key in ("llm", "tokenizer") and said not in stages) or (weights and "/" in said):
                continue
            folder = "; a folder is written with a /, as in ./NAME" if weights else ""
            known = f"there {'are' if names else 'is'} {', '.join(names) or 'none'}"
            text = f"is {show(said)}, must be an earlier {wanted} stage: {known}"
            yield ("stages", name, *key.split(".")), f"{text}{folder}{nearest(said, names)}"
        earlier[name] = kind


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        yield place, value
        return
    for key, below in value.items():
        yield from _leaves(below, f"{place}.{key}" if place else str(key))
