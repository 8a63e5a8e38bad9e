"""The part of a recipe that says what a tune stage starts from, and what of it is trained."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, ValidationInfo, field_validator

from aimv2_mllm.recipe.connectors import ConnectorChoice
from aimv2_mllm.recipe.data import ConversationData
from aimv2_mllm.recipe.train import StageSection, TrainConfig
from aimv2_mllm.recipe.types import Count, Number, Section, Switch, Text

# What peft calls our own keys of `lora`.
OWN_OPTIONS = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "r": "r",
    "target_modules": "targets",
    "use_dora": "dora",
    "use_rslora": "rslora",
}


def _blocks(value: Any) -> int | Literal["all"]:
    if value == "all":
        return "all"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError("must be how many of the last blocks, 0 or more, or all")


TowerBlocks = Annotated[int | Literal["all"], PlainValidator(_blocks)]


class LoraChoice(Section):
    """Which linear layers of the LLM get low-rank adapters, and how large these are."""

    r: Count = Field(default=8, description="rank of the adapters")
    alpha: Number = Field(
        default=16.0, gt=0, description="scale of the adapters, divided by r (rslora: by its root)"
    )
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="share dropped, in [0, 1)")
    targets: list[Text] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        min_length=1,
        description="names of the adapted linear layers",
    )
    rslora: Switch = Field(default=False, description="rank-stabilised scale (arXiv 2312.03732)")
    dora: Switch = Field(
        default=False, description="magnitudes are trained besides directions (arXiv 2402.09353)"
    )
    options: dict[Text, Any] = Field(
        default={}, description="further options of peft's LoraConfig, by its own names"
    )

    @field_validator("options")
    @classmethod
    def _are_further_ones(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, own in OWN_OPTIONS.items():
            if name in value:
                raise ValueError(f"must not have {name}, which is the key lora.{own} here")
        return value


class TuneStage(StageSection):
    """Tunes an aligned model, or one that is assembled for it: by adapters, or as it is."""

    PARTS: ClassVar = ("lora", "llm", "connector", "tower")
    kind: Literal["tune"] = Field(default="tune", description="the kind of the stage")
    start: Text | None = Field(
        default=None,
        description="an earlier align or tune stage, or a folder or hub id of a Llava; null: tower,"
        " llm and connector are assembled",
    )
    tower: Text | None = Field(
        default=None,
        description="without start: an earlier pretrain stage, or a folder or hub id of a tower",
    )
    llm: Text | None = Field(
        default=None,
        description="without start: tiny_llm, an earlier language stage, a folder or a hub id",
    )
    connector: ConnectorChoice | None = Field(
        default=None, description="without start: a connector's name, or its name and options"
    )
    trains: Literal["lora", "llm", "connector"] = Field(
        default="lora",
        description="lora: adapters on the LLM; llm: all of it; connector: the LLM stays frozen. "
        "The connector is always trained",
    )
    lora: LoraChoice = Field(default=LoraChoice(), description="the adapters")
    quantise: Literal["nf4", "int8"] | None = Field(
        default=None, description="in what form the frozen LLM is held; null: as precision says"
    )
    tower_blocks: TowerBlocks = Field(
        default=0, description="how many of the tower's last blocks are trained; all: all of it"
    )
    data: ConversationData = Field(default=ConversationData(), description="the samples")
    train: TrainConfig = Field(description="how it is optimised")

    @classmethod
    def parts_of(cls, said: Mapping[str, Any]) -> tuple[str, ...]:
        trains = said.get("trains", "lora")
        parts = ("connector",) if trains == "connector" else (trains, "connector")
        return (*parts, "tower") if said.get("tower_blocks") else parts

    @field_validator("tower", "llm", "connector")
    @classmethod
    def _is_given_where_start_is_not(cls, value: Any, info: ValidationInfo) -> Any:
        said = info.data
        if "start" not in said:  # which is then itself a mistake
            return value
        if said["start"] is not None and value is not None:
            raise ValueError("must be left out where start is given, whose own it is")
        if said["start"] is None and value is None:
            if info.field_name == "tower":
                raise ValueError("must be given where there is no start")
            if info.field_name == "llm" and said.get("tower") is not None:
                raise ValueError("must be given where there is a tower and no start")
        return value

    @field_validator("lora")
    @classmethod
    def _is_trained(cls, value: LoraChoice, info: ValidationInfo) -> LoraChoice:
        if value != LoraChoice() and info.data.get("trains") in ("llm", "connector"):
            raise ValueError(f"must be left out where trains is {info.data['trains']}")
        return value

    @field_validator("quantise")
    @classmethod
    def _is_frozen(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("trains") == "llm":
            raise ValueError(
                "must be null where trains is llm: what is quantised cannot be trained; adapters "
                "on it can, with trains lora"
            )
        lora = info.data.get("lora")
        if value == "int8" and lora is not None and lora.dora:
            raise ValueError(
                "must be nf4 or null where lora.dora is true: peft loses the scales of int8 "
                "weights there (0.21, on a CPU)"
            )
        return value

    @field_validator("data")
    @classmethod
    def _keeps_features_of_a_frozen_tower(
        cls, value: ConversationData, info: ValidationInfo
    ) -> ConversationData:
        if value.features is not None and info.data.get("tower_blocks"):
            raise ValueError("must have no features where tower_blocks are trained: they change")
        return value
