"""A recipe's stages, one after the other, in a run folder that can be left and taken up again at
any moment.

Owns the order of a run and what is written of each stage; what stands in the folder already is told
by `run_folder`.
"""

import hashlib
import json
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from aimv2_mllm import heap
from aimv2_mllm.data.pairs.batches import Share
from aimv2_mllm.disk import new_folder
from aimv2_mllm.engine.distributed import ALONE, Ranks, joined
from aimv2_mllm.engine.loop import train
from aimv2_mllm.engine.trackers import require
from aimv2_mllm.errors import RunFailed
from aimv2_mllm.files import sha256
from aimv2_mllm.folders import STAGE_FILE, versions
from aimv2_mllm.formats import part_row
from aimv2_mllm.model.shapes import only_shapes
from aimv2_mllm.narration import Narrate
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.schema import Recipe, made_from
from aimv2_mllm.recipe.stages import Stage
from aimv2_mllm.runs.run_folder import claim, lineage, locked, recall, to_train
from aimv2_mllm.stages.job import Job, is_loaded_once
from aimv2_mllm.stages.table import STAGES, check_inputs, check_shares, inputs


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
            recall(place)
            _check(place, ranks)
            ranks.first(lambda: _enter(place, held, tell))
            for name, stage in recipe.stages.items():
                run_stage(name, stage, place, tell, ranks)
        if not ranks.is_first:
            return None
        if recipe.evaluation is not None:
            from aimv2_mllm.reports.report import write_report

            write_report(place, narrate)
    return place.folder


def run_stage(
    name: str, stage: Stage, place: Place, narrate: Narrate, ranks: Ranks = ALONE
) -> None:
    """Build, train and save one stage, unless it is finished."""
    result = place.result(name)
    fingerprint = ranks.first(lambda: to_train(name, place))
    if fingerprint is None:
        narrate(f"stage {name}: finished, see {result}")
        return
    kind = STAGES[stage.kind]
    narrate(f"stage {name}: training {kind.trains}")
    if kind.is_even:
        heap.keep_freed()
    else:
        heap.map_large()
    # By kind: encoders that are compared begin with equal weights, and each kind with its own.
    torch.manual_seed(_number(place.recipe.seed, stage.kind))
    is_spared = is_loaded_once(stage, ranks.size) and not ranks.is_first
    with only_shapes() if is_spared else nullcontext():
        job = kind.build(stage, place)
    ranks.gather(None)  # however long one of them loads
    table = job.table()
    narrate("\n".join(f"  {part_row(*row)}" for row in table))
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
        "parents": [*inputs(stage, place).values(), *made_from(place.recipe, name)],
        "parts": [list(row) for row in table],
        "seconds": round(outcome["seconds"], 1),
        "rows": list(job.data.rows),
        "last": outcome["last"],
        **ended(),
        "versions": versions(),
        **job.record,
        **lineage(name, place),
    }
    ranks.first(lambda: _save(job, result, record))
    narrate(f"stage {name}: done in {outcome['seconds']:.0f} s, saved to {result}")


def _save(job: Job, result: Path, record: dict[str, Any]) -> None:
    """Write the result, of which no half is ever found; RunFailed where the disk refuses."""
    try:
        with new_folder(result) as unfinished:
            job.save(unfinished)
            files = sorted(path for path in unfinished.rglob("*") if path.is_file())
            record["files"] = {str(f.relative_to(unfinished)): sha256(f) for f in files}
            (unfinished / STAGE_FILE).write_text(json.dumps(record, indent=2) + "\n")
    except Exception as error:
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


def _enter(place: Place, held: ExitStack, narrate: Narrate) -> None:
    """Make and hold the run folder, and claim it for the recipe."""
    held.enter_context(locked(place.folder))
    claim(place, narrate)


def _say_nothing(text: str) -> None:
    """What narrates on ranks other than 0."""


def _number(seed: int, kind: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{kind}".encode()).digest()[:7])
