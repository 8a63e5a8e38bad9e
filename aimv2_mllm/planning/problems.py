"""What would stop a recipe, all of it: models, data, packages, folders that will not be found."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from os.path import isdir
from pathlib import Path
from typing import Any

from aimv2_mllm.engine.trackers import require
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.folders import pretrained_folder, talking_source
from aimv2_mllm.model import llms, mllm
from aimv2_mllm.model.decoder_weights import read_decoder
from aimv2_mllm.model.hub import locate
from aimv2_mllm.model.shapes import only_shapes
from aimv2_mllm.model.shards import weight_files
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.data import ConversationData
from aimv2_mllm.recipe.stages import Stage
from aimv2_mllm.runs.run_folder import check_begun, check_folder, recall
from aimv2_mllm.stages.llms import load_talker
from aimv2_mllm.stages.table import check_shares, check_stage, inputs, opened


@dataclass(frozen=True)
class Problem:
    """Something that would stop a run: the key of the recipe where it stands, and what it is."""

    key: str  # as in stages.align.llm
    text: str

    def __str__(self) -> str:
        lines = "; ".join(line.strip() for line in self.text.splitlines()).replace(":; ", ": ")
        return lines if lines.startswith(self.key) else f"{self.key}: {lines}"


def find_problems(place: Place, num_devices: int) -> list[Problem]:
    """Every problem of the recipe, in the order of its stages; weights are not read."""
    found = [
        problem
        for check in (check_folder, recall)
        for problem in _tried("output", partial(check, place))
    ]
    for name, stage in place.recipe.stages.items():
        here = f"stages.{name}"
        found += _tried(here, partial(check_begun, name, place))
        if place.result(name).is_dir():
            continue
        of_stage = [*_data(here, stage), *_models(here, stage, place)]
        # It stops at the first problem, which may be one that is known.
        found += of_stage or _tried(here, partial(_checked, name, place))
        found += _tried(f"{here}.train.batch_size", partial(check_shares, name, stage, num_devices))
        found += _tried(f"{here}.train.trackers", partial(require, stage.train.trackers))
    return found


def _checked(name: str, place: Place) -> None:
    with only_shapes():
        check_stage(name, place)


def _tried(key: str, check: Callable[[], Any]) -> Iterator[Problem]:
    try:
        check()
    except (UsageError, RunFailed) as error:
        yield Problem(key, str(error))


def _data(here: str, stage: Stage) -> Iterator[Problem]:
    for number in range(len(stage.data.sources)):
        yield from _tried(f"{here}.data.sources.{number}", partial(opened, stage, number))


def _models(here: str, stage: Stage, place: Place) -> Iterator[Problem]:
    """The models from outside that are not there, each at its key."""
    for key, value in inputs(stage, place).items():
        if key == "llm" and isinstance(stage.data, ConversationData):
            yield from _tried(f"{here}.{key}", partial(load_talker, value, stage.data))
        elif key == "tokenizer":
            yield from _tried(f"{here}.{key}", partial(llms.load_tokenizer, value, talks=False))
        elif key == "start":
            yield from _tried(f"{here}.{key}", partial(_llava, value))
        elif key == "start.decoder":
            yield from _tried(f"{here}.{key}", partial(read_decoder, Path(value)))
        else:
            yield from _tried(f"{here}.{key}", partial(_weights, value))


def _llava(source: str) -> None:
    mllm.llava_config(talking_source(source))


def _weights(source: str) -> None:
    with only_shapes():
        folder = locate(source)
    if isdir(source):
        weight_files(pretrained_folder(folder))
