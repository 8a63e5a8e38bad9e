"""The part of a recipe that says what its stages build and train, a section for each kind."""

from operator import attrgetter
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from aimv2_mllm.recipe.connectors import ConnectorChoice, MlpChoice
from aimv2_mllm.recipe.data import CaptionData, ConversationData
from aimv2_mllm.recipe.train import StageSection, TrainConfig
from aimv2_mllm.recipe.tune import TuneStage
from aimv2_mllm.recipe.types import Count, Number, Section, Switch, Text

RELEASED_AREAS = (128, 4096)  # of the released native encoder, patches
PATCH = 14  # side of a patch, pixels, of every AIMv2 encoder
# Of 4 or 5 patches a picture that is nearly square gets one, and none is left to predict.
_Area = Annotated[int, Field(ge=6, le=65_536)]


class EncoderChoice(Section):
    """The encoder to pre-train."""

    size: Literal[
        "aimv2_nano", "aimv2_base", "aimv2_large", "aimv2_huge", "aimv2_1b", "aimv2_3b"
    ] = Field(description="named size of the encoder")
    image_size: int = Field(
        ge=28, le=4096, multiple_of=14, description="side of the image, pixels, 28 to 4096"
    )
    native: Switch = Field(
        default=False,
        description="positions for any grid, and pictures in their own aspect ratio; batch sizes "
        "count pictures of image_size; other sizes fill the same number of patches",
    )
    areas: tuple[_Area, _Area] = Field(
        default=RELEASED_AREAS,
        strict=False,
        description="native: smallest and largest patch budget per picture; drawn per micro-batch",
    )

    @field_validator("areas")
    @classmethod
    def _are_those_of_a_native_encoder(
        cls, value: tuple[int, int], info: ValidationInfo
    ) -> tuple[int, int]:
        if value[0] > value[1]:
            raise ValueError("must be the least and then the most patches")
        if value != RELEASED_AREAS and info.data.get("native") is False:
            raise ValueError("must be left out where native is false: one image_size has one area")
        return value


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


class PretrainStage(StageSection):
    """Pre-trains an encoder on pictures and captions."""

    PARTS = ("encoder", "decoder")
    BY_SAMPLES = "all have as many patches, so that samples or patches are what weighs"
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

    @field_validator("train")
    @classmethod
    def _takes_pictures_of_all_areas(cls, value: TrainConfig, info: ValidationInfo) -> TrainConfig:
        encoder = info.data.get("encoder")
        if encoder is None or not encoder.native:
            return value
        if value.compile:
            raise ValueError("must have compile false where encoder.native is true: sizes vary")
        size, (_, most) = value.micro_batch_size or value.batch_size, encoder.areas
        if value.batch_size % size:
            raise ValueError(
                f"must have a micro_batch_size that divides batch_size where encoder.native is "
                f"true, and {size} does not divide {value.batch_size}"
            )
        patches = (encoder.image_size // PATCH) ** 2
        if size * patches < most:
            raise ValueError(
                f"must have a micro_batch_size of at least {-(-most // patches)} where "
                f"encoder.areas goes up to {most}: {size} pictures of {encoder.image_size} pixels "
                f"have {size * patches} patches, fewer than one such picture"
            )
        return value


class LitStage(StageSection):
    """Trains a text tower and a pooling head beside a frozen encoder (LiT), for zero-shot use."""

    PARTS = ("head", "text")
    BY_SAMPLES = (
        "contrasts are within a micro-batch, and how many there are decides what is learned"
    )
    kind: Literal["lit"] = Field(default="lit", description="the kind of the stage")
    tower: Text = Field(description="an earlier pretrain stage, a folder or a hub id")
    text: TextTowerChoice = Field(default=TextTowerChoice(), description="the text tower")
    projection_dim: Count = Field(default=768, description="width of the joint space, channels")
    tokenizer: Text = Field(description="tiny_llm, an earlier language stage, a folder or a hub id")
    data: CaptionData = Field(default=CaptionData(), description="the samples")
    train: TrainConfig = Field(
        description="how it is optimised; contrasts are within a micro-batch"
    )


class AlignStage(StageSection):
    """Trains a connector from a frozen tower to a frozen LLM."""

    PARTS = ("connector",)
    kind: Literal["align"] = Field(default="align", description="the kind of the stage")
    tower: Text = Field(
        description="an earlier pretrain stage, or a folder or hub id of a tower of any family"
    )
    llm: Text = Field(description="tiny_llm, an earlier language stage, a folder or a hub id")
    connector: ConnectorChoice = Field(
        default=MlpChoice(), description="a connector's name, or its name and options"
    )
    data: ConversationData = Field(default=ConversationData(), description="the samples")
    train: TrainConfig = Field(description="how it is optimised")


class LanguageStage(StageSection):
    """Trains a small LLM and its tokenizer on the text of the conversations."""

    PARTS = ("llm",)
    kind: Literal["language"] = Field(default="language", description="the kind of the stage")
    model: LanguageChoice = Field(description="the LLM to train")
    vocab_size: Count = Field(description="size of the tokenizer's vocabulary, tokens")
    data: ConversationData = Field(default=ConversationData(), description="the samples")
    train: TrainConfig = Field(description="how it is optimised")

    @field_validator("data")
    @classmethod
    def _has_no_tower(cls, value: ConversationData) -> ConversationData:
        if value.features is not None:
            raise ValueError("must have no features: a language stage has no tower")
        return value


Stage = PretrainStage | LitStage | AlignStage | TuneStage | LanguageStage
SECTIONS: dict[str, type[Stage]] = {
    "pretrain": PretrainStage,
    "lit": LitStage,
    "align": AlignStage,
    "tune": TuneStage,
    "language": LanguageStage,
}
# kind of a stage -> its keys that name a model -> the kinds of the earlier stages that may make it.
# The order counts: run folders are told apart by digests of these models one after the other.
REFERENCES: dict[str, dict[str, tuple[str, ...]]] = {
    "pretrain": {
        "start.encoder": ("pretrain",),
        "start.decoder": ("pretrain",),
        "tokenizer": ("language",),
    },
    "lit": {"tower": ("pretrain",), "tokenizer": ("language",)},
    "align": {"tower": ("pretrain",), "llm": ("language",)},
    "tune": {"tower": ("pretrain",), "llm": ("language",), "start": ("align", "tune")},
}


def references(stage: Stage) -> dict[str, str]:
    """The models that `stage` names, by key: earlier stages, folders or hub ids."""
    named = {key: attrgetter(key)(stage) for key in REFERENCES.get(stage.kind, {})}
    return {key: name for key, name in named.items() if name is not None}
