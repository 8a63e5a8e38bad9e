"""One table: what each kind of stage builds, what it trains, and what it takes from outside.

`run.py` trains whatever a row of `STAGES` builds. Which kind a stage is, besides this table only
those ask who look at it from outside: how it is judged, reported, planned and checked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aimv2_mllm.data.pairs.sources import open_sources
from aimv2_mllm.data.talks.sources import open_talk_sources
from aimv2_mllm.errors import UsageError
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.stages import (
    AlignStage,
    LanguageStage,
    LitStage,
    PretrainStage,
    Stage,
    references,
)
from aimv2_mllm.recipe.tune import TuneStage
from aimv2_mllm.stages.encoders import build_lit, build_pretrain, check_lit, check_pretrain
from aimv2_mllm.stages.job import Job
from aimv2_mllm.stages.llms import build_align, build_language, check_align
from aimv2_mllm.stages.tuning import build_tune, check_tune


@dataclass(frozen=True)
class StageKind:
    """A row of the table: how the stage is built, what of it is trained, in words, what tells by a
    UsageError before the first stage that its models from outside will not do, and whether its
    steps are all of a size."""

    build: Callable[[Any, Place], Job]
    trains: str
    check: Callable[[Any, Place], None] = lambda stage, place: None
    is_even: bool = False


# Native pre-training is even too: areas differ, and micro-batches have as many patches.
STAGES: dict[str, StageKind] = {
    "pretrain": StageKind(build_pretrain, "encoder and decoder", check_pretrain, is_even=True),
    "lit": StageKind(build_lit, "pooling head and text tower", check_lit, is_even=True),
    "align": StageKind(build_align, "connector", check_align),
    "tune": StageKind(
        build_tune, "LLM or adapters on it, connector, tower, as the recipe says", check_tune
    ),
    "language": StageKind(build_language, "LLM"),
}


def inputs(stage: Stage, place: Place) -> dict[str, str]:
    """The names of the models that the stage takes from outside of its recipe, by key."""
    named = references(stage).items()
    return {key: name for key, name in named if name not in place.recipe.stages}


def check_inputs(place: Place) -> None:
    """UsageError for a model from outside, a layer of it, or data, that a stage will not find.

    Said before the first stage is trained, since it would cost that stage's time later.
    """
    for name in place.recipe.stages:
        try:
            check_stage(name, place)
        except UsageError as error:
            raise UsageError(f"stage {name}: {error}") from None


def opened(stage: Stage, number: int) -> Any:
    """One of the stage's sources, opened; UsageError where it cannot be."""
    one: Any = stage.data.model_copy(update={"sources": [stage.data.sources[number]]})
    if isinstance(stage, PretrainStage | LitStage):
        return open_sources(one)[0]
    return open_talk_sources(one)[0]


def check_stage(name: str, place: Place) -> None:
    """UsageError for the first thing that one stage will not find."""
    stage = place.recipe.stages[name]
    done = place.result(name).is_dir()
    if isinstance(stage, PretrainStage | LitStage) and not done:
        open_sources(stage.data)
    if isinstance(stage, AlignStage | TuneStage | LanguageStage) and not done:
        open_talk_sources(stage.data)
    STAGES[stage.kind].check(stage, place)


def check_shares(name: str, stage: Stage, num_ranks: int) -> None:
    """UsageError for a step that so many processes cannot share evenly."""
    train, whole = stage.train, stage.train.batch_size
    said = f"stages.{name}.train.batch_size is {whole}"
    if isinstance(stage, PretrainStage) and stage.encoder.native:
        whole = train.num_mini_batches
        said = f"stages.{name}.train: batch_size / micro_batch_size is {whole}"
    if whole % num_ranks:
        above = whole + num_ranks - whole % num_ranks
        fitting = [size for size in (above - num_ranks, above) if size]
        raise UsageError(
            f"{said}, which {num_ranks} processes cannot share evenly;"
            f" {' or '.join(map(str, fitting))} they can"
        )
