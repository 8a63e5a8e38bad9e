"""A recipe's stages, one after the other, in a run folder that can be left and taken up again at
any moment.

Owns the run folder: its lock, its recipe, which stages are finished. Refuses a folder that another
recipe began.
"""

import fcntl
import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from aimv2_mllm.data.batches import Share
from aimv2_mllm.engine.checkpoint import owner
from aimv2_mllm.engine.disk import replace_file, sync
from aimv2_mllm.engine.distributed import Ranks, joined
from aimv2_mllm.engine.loop import train
from aimv2_mllm.engine.trackers import require
from aimv2_mllm.engine.training import CHECKPOINTS
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.folders import (
    RECIPE_FILE,
    STAGE_FILE,
    UNKNOWN,
    origins_of,
    stage_record,
    talking_source,
)
from aimv2_mllm.job import Job, Place
from aimv2_mllm.model.hub import commit_of, locate
from aimv2_mllm.model.mllm import llm_source
from aimv2_mllm.recipe import Recipe, changed_keys, deciding, dump_recipe
from aimv2_mllm.recipe_stages import PretrainStage, Stage
from aimv2_mllm.stages import STAGES, check_inputs, inputs, towers

Narrate = Callable[[str], None]
ALONE = Ranks()
LICENCE = "Apache-2.0"


def run(recipe: Recipe, narrate: Narrate) -> Path | None:
    """Run what of `recipe` is not done yet, then judge and report it; the run folder.

    Started by a launcher, this is one of several processes that train together; rank 0 alone
    writes, narrates and reports, and the others return None. Raises UsageError for a folder of
    another recipe or in use, RunFailed when a stage cannot go on.
    """
    with ExitStack() as held:
        with joined() as ranks:
            place = Place(recipe, recipe.output, Share(ranks.rank, ranks.size))
            tell = narrate if ranks.is_first else _say_nothing
            if ranks.size > 1:
                tell(f"{ranks.size} processes train together")
            _check(place, ranks)
            ranks.first(lambda: _enter(place, held, tell))
            for name, stage in recipe.stages.items():
                run_stage(name, stage, place, tell, ranks)
        if not ranks.is_first:
            return None
        if recipe.evaluation is not None:
            from aimv2_mllm.report import write_report

            write_report(place, narrate)
    return place.folder


def run_stage(
    name: str, stage: Stage, place: Place, narrate: Narrate, ranks: Ranks = ALONE
) -> None:
    """Build, train and save one stage, unless it is finished."""
    result = place.result(name)
    fingerprint, is_finished = ranks.first(lambda: _state(name, place))
    if is_finished:
        narrate(f"stage {name}: finished, see {result}")
        return
    packages = {name: version(name) for name in ("torch", "transformers", "aimv2-mllm")}
    versions = {**packages, "python": platform.python_version()}
    narrate(f"stage {name}: training {STAGES[stage.kind].trains}")
    torch.manual_seed(_number(place.recipe.seed, name))
    job = STAGES[stage.kind].build(stage, place)
    table = job.table()
    narrate(_as_text(table))
    for note in job.data.notes:
        narrate(f"  {note}")
    ended = job.prepare(job, ranks, narrate) if job.prepare else dict
    outcome = train(
        job.model,
        job.parts,
        job.objective,
        job.batches,
        config=stage.train,
        seed=place.recipe.seed,
        folder=result.parent,
        fingerprint=fingerprint + job.data.digest,
        narrate=narrate,
        ranks=ranks,
        workers=job.data.workers,
        max_skipped=job.data.max_skipped,
    )
    record = {
        "stage": name,
        "kind": stage.kind,
        "seed": place.recipe.seed,
        "recipe": stage.model_dump(mode="json"),
        "fingerprint": fingerprint,
        "parents": inputs(stage, place) + _earlier(name, place),
        "parts": [list(row) for row in table],
        "seconds": round(outcome["seconds"], 1),
        "rows": list(job.data.rows),
        "last": outcome["last"],
        **ended(),
        "versions": versions,
        **job.record,
        **_lineage(name, place),
    }
    ranks.first(lambda: _save(job, result, record))
    narrate(f"stage {name}: done in {outcome['seconds']:.0f} s, saved to {result}")


def _save(job: Job, result: Path, record: dict[str, Any]) -> None:
    """Write the result under another name and rename it when it is whole, so that no half of one is
    ever found."""
    unfinished = result.with_name(f"{result.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        job.save(unfinished)
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        record["files"] = {str(f.relative_to(unfinished)): _sha256(f) for f in files}
        (unfinished / STAGE_FILE).write_text(json.dumps(record, indent=2) + "\n")
        for file in [*files, unfinished / STAGE_FILE, unfinished]:
            sync(file)
        unfinished.rename(result)
        sync(result.parent)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        # The tokenizers library says with a bare Exception that the disk is full.
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            raise RunFailed(
                f"the result could not be written to {result} ({error}); the last checkpoint "
                "beside it is whole: mend that and run the same command again"
            ) from None
        raise


def _check(place: Place, ranks: Ranks) -> None:
    """UsageError for what would stop a stage later: a model, package or batch size."""
    check_inputs(place)
    for name, stage in place.recipe.stages.items():
        check_shares(name, stage, ranks.size)
        require(stage.train.trackers)


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


def _say_nothing(text: str) -> None:
    """What narrates on ranks other than 0."""


def _enter(place: Place, held: ExitStack, narrate: Narrate) -> None:
    """Make and hold the run folder, and claim it for the recipe."""
    held.enter_context(locked(place.folder))
    _claim(place, narrate)


def _state(name: str, place: Place) -> tuple[str, bool]:
    """The stage's fingerprint, and whether its result is there."""
    fingerprint = _fingerprint(name, place)
    return fingerprint, _is_finished(name, place, fingerprint)


def _is_finished(name: str, place: Place, fingerprint: str) -> bool:
    """Whether the stage's result is there; UsageError for one that this recipe did not make."""
    result = place.result(name)
    path = result / STAGE_FILE
    if not path.is_file():
        return False
    again = f"to train that stage again remove {result.parent}, and those of the stages after it"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        made, files = record["fingerprint"], dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: is not a stage's record ({error!r}); {again}") from None
    if made != fingerprint:
        raise UsageError(f"{result}: was made from another LLM, tower or stage than now; {again}")
    for file, digest in files.items():
        if not (result / file).is_file() or _sha256(result / file) != digest:
            raise UsageError(f"{result / file}: is not as the stage wrote it; {again}")
    return True


def check_begun(name: str, place: Place) -> None:
    """UsageError for a result, or a newest checkpoint, that was made from another LLM, tower or
    stage than now; what the stage starts from must be there, else it is passed over."""
    result = place.result(name)
    begun = owner(result.parent / CHECKPOINTS)
    is_done = (result / STAGE_FILE).is_file()
    if not (is_done or begun) or not all(place.result(s).is_dir() for s in _earlier(name, place)):
        return
    fingerprint = _fingerprint(name, place)
    if is_done:
        _is_finished(name, place, fingerprint)
    elif begun is not None and not begun.startswith(fingerprint):  # a digest of the data follows
        raise UsageError(
            f"{result.parent / CHECKPOINTS}: is of another LLM, tower or stage than now; give"
            f" another folder (output=FOLDER), or remove {result.parent} to start it over"
        )


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


def _claim(place: Place, narrate: Narrate) -> None:
    path = place.folder / RECIPE_FILE
    is_new = not path.exists()
    check_folder(place)
    text = dump_recipe(place.recipe)
    try:
        # Also what says how it is executed, which may be new.
        if is_new or path.read_text(encoding="utf-8") != text:
            replace_file(path, text.encode())
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written ({error.strerror})") from None
    if is_new:
        narrate(f"run folder {place.folder}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of runs, made if need be, against a second process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be the run folder ({error.strerror}); give output=FOLDER"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder}: another process is running there; wait for it or give output=FOLDER"
            ) from None
        except OSError as error:  # a network drive, for example
            raise UsageError(
                f"{folder}: cannot be locked ({error.strerror}); give output=FOLDER on another disk"
            ) from None
        yield


def _fingerprint(name: str, place: Place) -> str:
    """What decides a stage's numbers: its own part of the recipe (not how that is executed), the
    seed, the results it starts from, and the models from outside of the recipe."""
    stage = place.recipe.stages[name]
    # Their files and not their records, which hold the seconds they took.
    parents = [stage_record(place.result(other))["files"] for other in _earlier(name, place)]
    outside = [_digest(_folder(source, stage, place)) for source in inputs(stage, place)]
    own = deciding(stage.model_dump(mode="json"))
    text = json.dumps([name, place.recipe.seed, own, parents, outside], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _earlier(name: str, place: Place) -> list[str]:
    stages = list(place.recipe.stages)
    return stages[: stages.index(name)]


def _folder(source: str, stage: Stage, place: Place) -> Path:
    """Where a model from outside lies; an LLM or Llava of the hub has no folder, only its id."""
    if source in towers(stage, place):
        return locate(source)
    return Path(
        talking_source(source) if source == getattr(stage, "start", None) else llm_source(source)
    )


def _digest(folder: Path) -> str | dict[str, str]:
    """A model from outside by the contents of its files; an LLM of the hub by its id."""
    if not folder.is_dir():
        return str(folder)
    return {f.name: _sha256(f) for f in sorted(folder.iterdir()) if f.is_file()}


def _lineage(name: str, place: Place) -> dict[str, Any]:
    """Which models from outside went in, here or earlier, and the licence that this makes: that of
    the world's own weights, and theirs."""
    stage = place.recipe.stages[name]
    earlier = [stage_record(place.result(other)) for other in _earlier(name, place)]
    origins = [one for record in earlier for one in record.get("origins", [])]
    for source in inputs(stage, place):
        folder = _folder(source, stage, place)
        origins += origins_of(folder, source, commit_of(source, folder))
    origins = list({json.dumps(one): one for one in origins}.values())
    found = [record["licence"] for record in earlier]
    for one in origins:
        known = one["licence"] != UNKNOWN
        found.append(one["licence"] if known else f"that of {one['source']}")
    parts = {part for licence in found for part in licence.split(" and ")}
    return {"origins": origins, "licence": " and ".join(sorted({LICENCE, *parts}))}


def _number(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7])


def _as_text(table: list[tuple[str, int, bool]]) -> str:
    rows = [
        f"  {part:<12}{count:>13,}  {'trained' if trained else 'frozen'}"
        for part, count, trained in table
    ]
    return "\n".join(rows)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
