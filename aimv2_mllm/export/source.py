"""What is exported: a finished result, with what its record says of it.

Of a run it is the last finished stage that has what is wanted; else the folder that was given.
"""

from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

from aimv2_mllm.errors import UsageError
from aimv2_mllm.folders import (
    CONFIG_FILE,
    GIVE,
    LLAVAS,
    MUTE,
    RECIPE_FILE,
    STAGE_FILE,
    UNKNOWN,
    config_of,
    licence_of,
    origins_of,
    pretrained_folder,
    result_of,
    stage_record,
    stages_of,
    talking_folder,
)

LLAVA, ANY_LLAVA = LLAVAS


@dataclass(frozen=True)
class ExportSource:
    """A model's folder as it is exported; `name` is what the user calls it, `config` what its
    config.json says, and `record` its stage.json, empty where no stage of ours made it."""

    name: str
    folder: Path
    config: dict[str, Any]
    record: dict[str, Any]

    @property
    def licence(self) -> str:
        """The licence of its weights, as its record or its card says."""
        return str(self.record.get("licence") or licence_of(self.folder) or UNKNOWN)

    @property
    def origins(self) -> list[dict[str, str]]:
        """The models from outside that went into it, with revision and licence."""
        return origins_of(self.folder, self.name)

    @property
    def run(self) -> Path | None:
        """The run folder that it lies in, if it does."""
        above = self.folder.parent.parent
        return above if isfile(above / RECIPE_FILE) else None


def talking(name: str) -> ExportSource:
    """The Llava in a run folder or model folder; UsageError where there is none."""
    source = _opened(name, talking_folder(Path(name)))
    kind = source.config.get("model_type")
    if kind not in (LLAVA, ANY_LLAVA):
        raise UsageError(
            f"{source.folder / CONFIG_FILE}: its model_type is {kind!r}, must be 'llava'; {GIVE}"
        )
    return source


def seeing(name: str) -> ExportSource:
    """What the encoder of `name` is taken from: of a run, the last finished stage in which an
    encoder was trained, else its last finished pretrain stage; else the folder given."""
    folder = Path(name)
    if not isfile(folder / RECIPE_FILE):
        made = [stage["kind"] for stage in stages_of(folder).values()]
        if wrong := [kind for kind in made if kind in ("language", "lit")]:
            raise UsageError(
                f"{name}: is {MUTE[wrong[0]]}; give the folder of a pretrain, align or tune stage"
            )
        return _opened(name, folder)
    kinds = {stage: recipe["kind"] for stage, recipe in stages_of(folder).items()}
    results = [result_of(folder, s) for s, kind in kinds.items() if kind in ("align", "tune")]
    finished = [result for result in results if isfile(result / STAGE_FILE)]
    tuned = [
        result
        for result in finished
        if ["tower", True] in [[part, is_trained] for part, _, is_trained in _parts(result)]
    ]
    if tuned or "pretrain" not in kinds.values():
        found = tuned[-1] if tuned else talking_folder(folder)
    else:
        found = pretrained_folder(folder)
    return _opened(name, found)


def _parts(result: Path) -> list[Any]:
    return list(stage_record(result).get("parts", []))


def _opened(name: str, folder: Path) -> ExportSource:
    return ExportSource(name, folder, config_of(folder), stage_record(folder))
