"""The part of a recipe that says how a stage is optimised, and what every stage has of it."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from aimv2_mllm.errors import nearest
from aimv2_mllm.recipe.types import Count, Number, Section, Switch, Text


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
    micro_batch_tokens: Count | None = Field(
        default=None,
        description="align, tune and language: token budget per forward pass (image tokens count), "
        "instead of micro_batch_size; equally full on every device; a longer conversation goes "
        "alone",
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

    @property
    def num_mini_batches(self) -> int:
        """How many mini-batches a step of a native encoder has, over all devices."""
        return self.batch_size // (self.micro_batch_size or self.batch_size)

    @field_validator("micro_batch_size")
    @classmethod
    def _fits_the_batch(cls, value: int | None, info: ValidationInfo) -> int | None:
        batch = info.data.get("batch_size")  # absent when it is itself a mistake
        if value and batch and value > batch:
            raise ValueError(f"must be at most batch_size, which is {batch}")
        return value

    @field_validator("micro_batch_tokens")
    @classmethod
    def _stands_alone(cls, value: int | None, info: ValidationInfo) -> int | None:
        size = info.data.get("micro_batch_size")
        if value and size:
            raise ValueError(
                f"must be null where micro_batch_size is {size}: a micro-batch is counted in "
                "samples or in tokens"
            )
        return value

    @field_validator("warmup_steps")
    @classmethod
    def _ends_before_the_last_step(cls, value: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps and value >= steps:
            raise ValueError(f"must be less than steps, which is {steps}")
        return value


class StageSection(Section):
    """What the section of every stage is made of."""

    PARTS: ClassVar[tuple[str, ...]]  # what is trained, by the names that part_lr may have
    BY_SAMPLES: ClassVar[str] = ""  # why its micro-batches are counted in samples alone

    @classmethod
    def parts_of(cls, said: Mapping[str, Any]) -> tuple[str, ...]:
        """What of `PARTS` is trained where the stage says so much of itself."""
        return cls.PARTS

    @field_validator("train", check_fields=False)
    @classmethod
    def _suits_the_stage(cls, value: TrainConfig, info: ValidationInfo) -> TrainConfig:
        if value.micro_batch_tokens and cls.BY_SAMPLES:
            raise ValueError(
                "must have micro_batch_size in place of micro_batch_tokens in a stage of this kind:"
                f" {cls.BY_SAMPLES}"
            )
        parts = cls.parts_of(info.data)
        unknown = [part for part in value.part_lr if part not in parts]
        if unknown:
            known = f"{', '.join(parts)}{nearest(unknown[0], parts)}"
            raise ValueError(f"must name in part_lr parts of the stage, which are {known}")
        return value
