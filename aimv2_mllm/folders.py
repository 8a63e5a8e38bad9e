"""What a folder is: a run, or a model of one stage; told by the files in it, never by its name.

Refuses folders that are neither, finds in a run the model that talks, and says where weights came
from and under what licence.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from os.path import isdir, isfile  # pathlib's raise on a name that is too long or out of reach
from pathlib import Path
from typing import Any

from aimv2_mllm.errors import UsageError

RECIPE_FILE, STAGE_FILE, CONFIG_FILE = "recipe.yaml", "stage.json", "config.json"
CARD_FILE, UNKNOWN = "README.md", "unknown"
RESULT = "model"  # of a stage: the folder in its own
TALKING = ("align", "tune")  # kinds of stages whose result sees and talks
LLAVAS = ("llava", "aimv2_mllm_llava")  # model types of what they make: transformers' own, and ours
MUTE = {
    "pretrain": "an encoder, which cannot talk",
    "convert": "an encoder, which cannot talk",
    "lit": "a LiT model, which tells what fits and cannot talk",
    "language": "an LLM, which has no eyes",
}
GIVE = "give a run folder, or the model folder of an align or tune stage"


def stages_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The recipes of a folder's stages by name: all of a run's, in order, or the one of a model.

    Empty for a model that no stage of ours made. Raises UsageError for a folder that is neither.
    """
    if not isdir(folder):
        what = "is a file" if isfile(folder) else "there is no such folder"
        raise UsageError(f"{folder}: {what}; {GIVE}")
    if isfile(folder / RECIPE_FILE):
        return _run_stages(folder / RECIPE_FILE)
    if isfile(folder / STAGE_FILE):
        path = folder / STAGE_FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return {record["stage"]: {**record["recipe"], "kind": record["kind"]}}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: is not a stage's record ({error!r}); {GIVE}") from None
    if isfile(folder / CONFIG_FILE):
        return {}
    inside = folder / RESULT
    hint = f"give {inside}" if isdir(inside) else GIVE
    files = f"{RECIPE_FILE}, {STAGE_FILE} nor {CONFIG_FILE}"
    raise UsageError(f"{folder}: is no model and no run, for it has neither {files}; {hint}")


def config_of(folder: Path, give: str = GIVE) -> dict[str, Any]:
    """What the config of the model in `folder` says, nothing where it is no mapping; UsageError,
    which ends with what to `give`, where there is none."""
    path = folder / CONFIG_FILE
    if not isfile(path):
        raise UsageError(f"{folder} has no {CONFIG_FILE}: {give}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not JSON ({error}): {give}") from None
    return content if isinstance(content, dict) else {}


def model_type_of(folder: Path, give: str = GIVE) -> Any:
    """What the config of the model in `folder` says that it is, None where it says nothing."""
    return config_of(folder, give).get("model_type")


def _run_stages(path: Path) -> dict[str, dict[str, Any]]:
    import yaml

    try:
        stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
        return {name: {**stage, "kind": stage["kind"]} for name, stage in stages.items()}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: is not a run's recipe ({error!r}); {GIVE}") from None


def talking_folder(folder: Path) -> Path:
    """The folder with the Llava: of a run, its last finished align or tune stage's result.

    Raises UsageError, with what to do, when there is none.
    """
    if not isfile(folder / RECIPE_FILE):
        kinds = [stage["kind"] for stage in stages_of(folder).values()]
        wrong = [kind for kind in kinds if kind not in TALKING]
        if wrong:
            raise UsageError(f"{folder}: is {MUTE.get(wrong[0], f'of a {wrong[0]} stage')}; {GIVE}")
        return folder
    return _finished(folder, TALKING, GIVE)


def talking_folders(folder: Path) -> dict[str, Path]:
    """Every folder with a Llava by a name for it: of a run, the results of its finished align and
    tune stages, the last first. Raises UsageError, with what to do, when there is none."""
    if not isfile(folder / RECIPE_FILE):
        name = folder.resolve()
        return {(name.parent if name.name == RESULT else name).name: talking_folder(folder)}
    found = _all_finished(folder, TALKING, GIVE)
    return {f"{folder.resolve().name}/{one.parent.name}": one for one in reversed(found)}


def talking_source(name: str) -> str:
    """Where the Llava called `name` lies: of a folder that is a run, the result in it; else as
    given, a folder or a hub id. UsageError for a folder without one."""
    return str(talking_folder(Path(name))) if isdir(name) else name


def pretrained_folder(folder: Path) -> Path:
    """The folder with the encoder: of a run, its last finished pretrain stage's result; else
    `folder` itself.

    Raises UsageError when a run has none.
    """
    if not isfile(folder / RECIPE_FILE):
        return folder
    return _finished(folder, ("pretrain",), "give a run with a pretrain stage, or an encoder")


def _finished(folder: Path, wanted: tuple[str, ...], give: str) -> Path:
    """The result of a run's last finished stage of the kinds that are wanted."""
    return _all_finished(folder, wanted, give)[-1]


def _all_finished(folder: Path, wanted: tuple[str, ...], give: str) -> list[Path]:
    """The results of a run's finished stages of the kinds that are wanted, one at least."""
    kinds = {name: stage["kind"] for name, stage in stages_of(folder).items()}
    words = " or ".join(wanted)
    results = [result_of(folder, name) for name, kind in kinds.items() if kind in wanted]
    if not results:
        known = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise UsageError(f"{folder}: this run has no {words} stage, only {known}; {give}")
    finished = [result for result in results if isfile(result / STAGE_FILE)]
    if not finished:
        raise UsageError(
            f"{folder}: no {words} stage of this run is finished; "
            f"run `aimv2-mllm run {folder / RECIPE_FILE} output={folder}` to the end first"
        )
    return finished


def result_of(run: str | Path, stage: str) -> Path:
    """The folder with the result of a run's stage."""
    return Path(run) / stage / RESULT


def stage_record(folder: Path) -> dict[str, Any]:
    """What the `stage.json` in `folder` says, empty where there is none; UsageError for one that
    cannot be read."""
    path = folder / STAGE_FILE
    if not isfile(path):
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: is not a stage's record ({error!r}); {GIVE}") from None


def digest_of(record: Mapping[str, Any]) -> str:
    """What tells the result that a stage's `record` is of from others: a digest of its files."""
    return hashlib.sha256(json.dumps(record["files"]).encode()).hexdigest()


def licence_of(folder: Path) -> str | None:
    """The licence of the weights in `folder`: that of its stage's record, else of its model card's
    front matter (`license_name`, or `license`); None where neither says."""
    if licence := stage_record(folder).get("licence"):
        return str(licence)
    if not isfile(folder / CARD_FILE):
        return None
    card = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    if not card or card[0].strip() != "---":
        return None
    # Plain `key: value` lines, so that no YAML library is needed beside an encoder.
    said = {}
    for line in card[1:]:
        if line.strip() == "---":
            break
        key, _, value = line.partition(":")
        said[key] = value.partition(" #")[0].strip().strip("'\"")
    return said.get("license_name") or said.get("license") or None


def origin_of(folder: Path, name: str, revision: str | None = None) -> dict[str, str]:
    """What the weights in `folder`, which the user calls `name`, are: source, revision, licence.

    `revision` is the commit where they were downloaded; else the folder's own record tells it.
    """
    record = stage_record(folder)
    source = name.partition("@")[0] if revision else name
    if Path(name).is_absolute():  # a path of this machine tells nobody else anything
        source = Path(name).name
    return {
        "source": source,
        "revision": revision or record.get("revision") or record.get("fingerprint") or UNKNOWN,
        "licence": licence_of(folder) or UNKNOWN,
    }


def origins_of(folder: Path, name: str, revision: str | None = None) -> list[dict[str, str]]:
    """Where the weights in `folder` first came from: what its record says, else themselves."""
    origins = stage_record(folder).get("origins")
    return list(origins) if origins else [origin_of(folder, name, revision)]


def versions() -> dict[str, str]:
    """The versions of what computes, as records have them."""
    packages = {name: version(name) for name in ("torch", "transformers", "aimv2-mllm")}
    return {**packages, "python": platform.python_version()}
