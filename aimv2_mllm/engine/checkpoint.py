"""Checkpoints that are whole or not there: written aside, synced, renamed, checked when read.

Owns `checkpoints/step-N/{state.json, tensors.safetensors}` and `checkpoints/latest`; of a model
that is sharded each rank writes its own `tensors-R-of-N.safetensors`. Whatever wrote it, any number
of ranks can read it. Refuses pickle, damaged files and checkpoints of another run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from aimv2_mllm.disk import put, remedy, replace_file, why, write_synced
from aimv2_mllm.engine.distributed import ALONE, Ranks
from aimv2_mllm.engine.pieces import Stored, to_write, write
from aimv2_mllm.errors import RunFailed, UsageError

TENSORS, STATE, LATEST = "tensors.safetensors", "state.json", "latest"


class _DamagedError(Exception):
    """Why one checkpoint cannot be used."""


def step_name(step: int) -> str:
    """The folder name of a checkpoint, such as `step-000123`."""
    return f"step-{step:06d}"


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    *,
    keep: int,
    ranks: Ranks = ALONE,
) -> None:
    """Write `folder/step-N`, point `latest` to it, and remove all but the newest `keep`.

    `state` is JSON and holds at least `fingerprint`. All ranks call this together and return when
    it is done. Raises `RunFailed` when the disk does not take it; then the checkpoints from before
    are as they were and nothing half-written is left.
    """
    assert keep >= 1, keep
    assert "fingerprint" in state, sorted(state)
    final = folder / step_name(step)
    pieces = to_write(tensors, is_first=ranks.is_first)
    needed = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    what = f"checkpoint {final.name} ({needed:.1f} MiB) could not be written"
    unfinished = ranks.first(lambda: _begun(final, what))
    file = _file_name(tensors, ranks)
    files, failure = {}, None
    try:
        if pieces:
            files = {file: write(unfinished / file, pieces)}
    except OSError as error:
        failure = error
    outcomes = ranks.gather((files, failure))
    state = {**state, "step": step}

    def finish() -> None:
        with _whole_or_refused(unfinished, what):
            _finish(unfinished, final, state, outcomes)
            for old in _newest_first(folder)[keep:]:
                _remove(old)

    ranks.first(finish)


def _file_name(tensors: Mapping[str, Tensor], ranks: Ranks) -> str:
    is_sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    return f"tensors-{ranks.rank}-of-{ranks.size}.safetensors" if is_sharded else TENSORS


def _begun(final: Path, what: str) -> Path:
    """An empty folder beside `final`, with a name that no checkpoint has."""
    assert not final.exists(), f"{final} is there already"
    unfinished = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    with _whole_or_refused(unfinished, what):
        unfinished.mkdir(parents=True)
    return unfinished


def _finish(unfinished: Path, final: Path, state: dict[str, Any], outcomes: list[Any]) -> None:
    """Make a checkpoint of what all ranks have written; the `OSError` if one of them failed."""
    files: dict[str, Any] = {}
    for written, failure in outcomes:
        if failure is not None:
            raise failure
        files |= written
    text = json.dumps({**state, "files": files}, indent=1, allow_nan=False)
    write_synced(unfinished / STATE, text.encode())
    put(unfinished, final)
    replace_file(final.parent / LATEST, f"{final.name}\n".encode())


@contextmanager
def _whole_or_refused(unfinished: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise RunFailed(_refusal(error, unfinished.parent, what)) from error


def load_newest(
    folder: Path, fingerprint: str, narrate: Callable[[str], None], *, ranks: Ranks = ALONE
) -> tuple[int, Stored, dict[str, Any]] | None:
    """The newest whole checkpoint as (step, tensors still on the disk, state), or None without one.

    Damaged ones are narrated and removed, leftovers of a killed save too, and `latest` is put
    right; rank 0 decides for all. Raises `UsageError` for a checkpoint with another fingerprint and
    for one that the system does not let us read; then nothing is removed.
    """
    step = ranks.first(lambda: _newest_whole(folder, fingerprint, narrate))
    if step is None:
        return None
    path = folder / step_name(step)
    try:
        state = json.loads((path / STATE).read_bytes())
        return step, Stored([path / name for name in state["files"]]), state
    except OSError as error:
        raise UsageError(
            f"{path}: rank 0 can read it, this rank cannot ({error.strerror or error}): the run"
            " folder must lie on a disk that all machines share"
        ) from error


def _newest_whole(folder: Path, fingerprint: str, narrate: Callable[[str], None]) -> int | None:
    damaged: list[tuple[Path, str]] = []
    step = None
    for path in _newest_first(folder):
        try:
            step = _checked(path, fingerprint)
            break
        except _DamagedError as error:
            damaged.append((path, str(error)))
    onwards = "starting from the beginning" if step is None else f"going on from {step_name(step)}"
    for path, reason in damaged:
        narrate(f"checkpoint {path.name} is damaged ({reason}): {onwards}")
    _tidy(folder, [path for path, _ in damaged], step)
    return step


def owner(folder: Path) -> str | None:
    """The fingerprint of the newest checkpoint in `folder`, None without one that can be read."""
    for path in _newest_first(folder):
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads((path / STATE).read_bytes())["fingerprint"])
    return None


def what_is_kept(folder: Path) -> str:
    """Half a sentence for the end of a run: which checkpoint in `folder` is the newest."""
    kept = next((path.name for path in _newest_first(folder)), None)
    return f"the last whole checkpoint, {kept}, is kept" if kept else "there is no checkpoint yet"


def _checked(path: Path, fingerprint: str) -> int:
    """The step of the checkpoint `path`, every byte of which is as it was written."""
    try:
        state = json.loads((path / STATE).read_bytes())
        step, files, owner = state["step"], dict(state["files"]), state["fingerprint"]
        if owner != fingerprint:
            raise UsageError(
                f"{path} belongs to another run (fingerprint {owner}, this run has {fingerprint}):"
                " settings, data or model changed; choose another run folder, or remove this one"
                " to start over"
            )
        if step_name(step) != path.name:
            raise _DamagedError(f"{STATE} is of step {step}")
        for name, facts in files.items():
            if Path(name).name != name:
                raise _DamagedError(f"{STATE} names the file {name!r}")
            _check_file(path / name, facts)
        Stored([path / name for name in files])
        return int(step)
    except UsageError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _DamagedError(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}; make it readable or remove it"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{STATE} is no whole JSON: {error}") from error
    except SafetensorError as error:
        raise _DamagedError(str(error)) from error


def _check_file(path: Path, facts: dict[str, Any]) -> None:
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise _DamagedError(f"{path.name} has {size} bytes instead of {facts['bytes']}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
            raise _DamagedError(f"{path.name} has another sha256")


def _tidy(folder: Path, damaged: list[Path], step: int | None) -> None:
    try:
        for path in [*folder.glob("step-*.tmp-*"), *folder.glob(f"{LATEST}.*")]:
            path.unlink() if path.is_file() else shutil.rmtree(path)
        latest = folder / LATEST
        if step is None:
            latest.unlink(missing_ok=True)
        elif not latest.is_file() or latest.read_text().strip() != step_name(step):
            replace_file(latest, f"{step_name(step)}\n".encode())
        for path in damaged:
            _remove(path)
    except OSError as error:
        raise RunFailed(_refusal(error, folder, "leftovers could not be cleared")) from error


def _newest_first(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    whole = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(whole, key=lambda path: -int(path.name.removeprefix("step-")))


def _remove(path: Path) -> None:
    # Renamed first: a kill half-way leaves a leftover, not a checkpoint that looks damaged.
    leftover = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    path.rename(leftover)
    leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover)


def _refusal(error: OSError, folder: Path, what: str) -> str:
    return f"{what}: {why(error, folder)}; {what_is_kept(folder)}; {remedy(error)}"
