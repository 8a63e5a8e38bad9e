"""The folder of a run: who holds it, whose recipe it is of, which stages are finished in it, and
where their results come from.

Refuses a folder that another recipe began or another process holds, and results that were spoilt or
made from other models than now.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from aimv2_mllm.disk import replace_file
from aimv2_mllm.engine.checkpoint import owner
from aimv2_mllm.engine.training import CHECKPOINTS
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.files import sha256
from aimv2_mllm.folders import (
    RECIPE_FILE,
    STAGE_FILE,
    UNKNOWN,
    origins_of,
    pretrained_folder,
    talking_source,
)
from aimv2_mllm.model.hub import COMMITS, commit_of, facts_folder, locate
from aimv2_mllm.model.llms import llm_source
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.schema import (
    ONCE_DECIDING,
    changed_keys,
    deciding,
    dump_recipe,
    made_from,
)
from aimv2_mllm.stages.table import inputs

LICENCE = "Apache-2.0"
HUB_FILE = "hub.json"  # the commits of the hub's models with which the run was begun


@contextmanager
def locked(folder: Path, give: str = "give output=FOLDER") -> Iterator[None]:
    """Hold a folder, made if need be, against a second process; UsageError, with what to `give`,
    where one has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be the folder of results ({error.strerror}); {give}"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder}: another process is running there; wait for it or {give}"
            ) from None
        except OSError as error:  # a network drive, for example
            raise UsageError(
                f"{folder}: cannot be locked ({error.strerror}); {give} on another disk"
            ) from None
        yield


def recall(place: Place) -> None:
    """Let the hub's models be those with which the run was begun, if it was, whatever is on the hub
    today; UsageError where that cannot be read."""
    path = place.folder / HUB_FILE
    if not path.exists():
        return
    try:
        COMMITS.update(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path}: is not a run's list of commits ({error!r}); give another output=FOLDER"
        ) from None


def claim(place: Place, narrate: Callable[[str], None]) -> None:
    """Write the recipe into its run folder, and which models of the hub it means; UsageError where
    that is another recipe's."""
    path = place.folder / RECIPE_FILE
    is_new = not path.exists()
    check_folder(place)
    text = dump_recipe(place.recipe)
    try:
        # Also what says how it is executed, which may be new.
        if is_new or path.read_text(encoding="utf-8") != text:
            replace_file(path, text.encode())
        _remember(place)
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written ({error.strerror})") from None
    if is_new:
        narrate(f"run folder {place.folder}")


def _remember(place: Place) -> None:
    path = place.folder / HUB_FILE
    given = [
        name for stage in place.recipe.stages.values() for name in inputs(stage, place).values()
    ]
    text = json.dumps({name: COMMITS[name] for name in given if name in COMMITS}, indent=2)
    if text != (path.read_text(encoding="utf-8") if path.exists() else "{}"):
        replace_file(path, text.encode())


def check_folder(place: Place) -> None:
    """UsageError for a run folder that another recipe began."""
    path = place.folder / RECIPE_FILE
    if not path.exists():
        return
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
        changes = changed_keys(dict(old), place.recipe)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UsageError(
            f"{path}: is not a run's recipe ({error!r}); give another output=FOLDER"
        ) from None
    if changes:
        lines = "\n".join(f"  {line}" for line in changes)
        raise UsageError(
            f"{place.folder} was begun with another recipe:\n{lines}\n"
            "Give another folder (output=FOLDER), or remove this one."
        )


def check_begun(name: str, place: Place) -> None:
    """UsageError for a result, or a newest checkpoint, that was made from another LLM, tower or
    stage than now; what the stage starts from must be there, else it is passed over."""
    result = place.result(name)
    begun = owner(result.parent / CHECKPOINTS)
    is_done = (result / STAGE_FILE).is_file()
    parents = made_from(place.recipe, name)
    if not (is_done or begun) or not all(place.result(s).is_dir() for s in parents):
        return
    fingerprint = to_train(name, place)
    if fingerprint and begun and not begun.startswith(fingerprint):  # a digest of the data follows
        raise UsageError(
            f"{result.parent / CHECKPOINTS}: is of another LLM, tower or stage than now; give"
            f" another folder (output=FOLDER), or remove {result.parent} to start it over"
        )


def to_train(name: str, place: Place) -> str | None:
    """The fingerprint under which the stage is to be trained, None where its result is there;
    UsageError for one that this recipe did not make."""
    result = place.result(name)
    if (result / STAGE_FILE).is_file():
        _demand_own(result, name, place)
        return None
    stage = place.recipe.stages[name].model_dump(mode="json")
    now, once = _fingerprints(name, place, stage)
    begun = owner(result.parent / CHECKPOINTS)
    return once if begun and begun.startswith(once) else now


def _demand_own(result: Path, name: str, place: Place) -> None:
    """UsageError for a result of the stage that this recipe did not make."""
    path = result / STAGE_FILE
    again = f"to train that stage again remove {result.parent}, and those of stages made from it"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        made, files, said = record["fingerprint"], dict(record["files"]), dict(record["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: is not a stage's record ({error!r}); {again}") from None
    if made not in _fingerprints(name, place, said):
        raise UsageError(f"{result}: was made from another LLM, tower or stage than now; {again}")
    for file, digest in files.items():
        if not (result / file).is_file() or sha256(result / file) != digest:
            raise UsageError(f"{result / file}: is not as the stage wrote it; {again}")


def _fingerprints(name: str, place: Place, said: Mapping[str, Any]) -> tuple[str, str]:
    """What decides a stage's numbers: its own part of the recipe (not how that is executed), the
    seed, the results it starts from, and the models from outside of the recipe.

    The second is how it was taken once, of all stages before it and of what was `said` of
    `ONCE_DECIDING`: what has it was made from the same too.
    """
    stages, stage = list(place.recipe.stages), place.recipe.stages[name]
    named = inputs(stage, place).items()
    outside = [_digest(source, _folder(key, source)) for key, source in named]

    def digest(own: Mapping[str, Any], parents: Sequence[str]) -> str:
        # Their files and not their records, which hold the seconds they took.
        files = [place.record(other).get("files") for other in parents]
        text = json.dumps([name, place.recipe.seed, own, files, outside], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    own = deciding(stage.model_dump(mode="json"))
    once = {
        part: {**own[part], **{key: said.get(part, {}).get(key) for key in keys}}
        for part, keys in ONCE_DECIDING.items()
    }
    return (
        digest(own, made_from(place.recipe, name)),
        digest({**own, **once}, stages[: stages.index(name)]),
    )


def _folder(key: str, source: str) -> Path:
    """Where the model from outside lies that a stage's `key` names, of a run the result that is
    meant; of an LLM or Llava of the hub, what says which it is."""
    if key == "start":
        return facts_folder(talking_source(source))
    if key in ("llm", "tokenizer"):
        return facts_folder(llm_source(source))
    return pretrained_folder(locate(source)) if key == "tower" else locate(source)


def _digest(source: str, folder: Path) -> str | dict[str, str]:
    """A model from outside by the contents of its files; of the hub by its commit, whatever of it
    is downloaded."""
    if commit := commit_of(source, folder):
        return commit
    if not folder.is_dir():
        return str(folder)
    return {f.name: sha256(f) for f in sorted(folder.iterdir()) if f.is_file()}


def lineage(name: str, place: Place) -> dict[str, Any]:
    """Which models from outside went in, here or earlier, and the licence that this makes: that of
    the world's own weights, and theirs."""
    stage = place.recipe.stages[name]
    records = [place.record(other) for other in made_from(place.recipe, name)]
    origins = [one for record in records for one in record.get("origins", [])]
    for key, source in inputs(stage, place).items():
        folder = _folder(key, source)
        origins += origins_of(folder, source, commit_of(source, folder))
    origins = list({json.dumps(one): one for one in origins}.values())
    found = [record["licence"] for record in records]
    for one in origins:
        known = one["licence"] != UNKNOWN
        found.append(one["licence"] if known else f"that of {one['source']}")
    parts = {part for licence in found for part in licence.split(" and ")}
    return {"origins": origins, "licence": " and ".join(sorted({LICENCE, *parts}))}
