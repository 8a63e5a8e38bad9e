"""Checkpoints that are whole or not there: written aside, synced, renamed, checked when read.

Owns `checkpoints/step-N/{tensors.safetensors, state.json}` and `checkpoints/latest`. Refuses
pickle, damaged files and checkpoints of another run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aimv2_mllm.errors import RunFailed, UsageError

TENSORS, STATE, LATEST = "tensors.safetensors", "state.json", "latest"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# The format's own names of the types.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _DamagedError(Exception):
    """Why one checkpoint cannot be used."""


def step_name(step: int) -> str:
    """The folder name of a checkpoint, such as `step-000123`."""
    return f"step-{step:06d}"


def save(
    folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int
) -> None:
    """Write `folder/step-N`, point `latest` to it, and remove all but the newest `keep`.

    `state` is JSON and holds at least `fingerprint`. Raises `RunFailed` when the disk does not take
    it; then the checkpoints from before are as they were and nothing half-written is left.
    """
    assert keep >= 1, keep
    assert "fingerprint" in state, sorted(state)
    final = folder / step_name(step)
    assert not final.exists(), f"{final} is there already"
    unfinished = folder / f"{final.name}.tmp-{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        facts = _write_tensors(unfinished / TENSORS, tensors)
        text = json.dumps({**state, "step": step, "tensors": facts}, indent=1, allow_nan=False)
        _write_synced(unfinished / STATE, text.encode())
        _sync_folder(unfinished)
        unfinished.rename(final)
        _sync_folder(folder)
        replace_file(folder / LATEST, f"{final.name}\n".encode())
        for old in _newest_first(folder)[keep:]:
            _remove(old)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        needed = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
        what = f"checkpoint {final.name} ({needed:.1f} MiB) could not be written"
        raise RunFailed(_refusal(error, folder, what)) from error


def load_newest(
    folder: Path, fingerprint: str, narrate: Callable[[str], None]
) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
    """The newest whole checkpoint as (step, tensors on the CPU, state), or None without one.

    Damaged ones are narrated and removed, leftovers of a killed save too, and `latest` is put
    right. Raises `UsageError` for a checkpoint with another fingerprint and for one that the system
    does not let us read; then nothing is removed.
    """
    damaged: list[tuple[Path, str]] = []
    found = None
    for path in _newest_first(folder):
        try:
            found = _read(path, fingerprint)
            break
        except _DamagedError as reason:
            damaged.append((path, str(reason)))
    onwards = f"going on from {step_name(found[0])}" if found else "starting from the beginning"
    for path, why in damaged:
        narrate(f"checkpoint {path.name} is damaged ({why}): {onwards}")
    _tidy(folder, [path for path, _ in damaged], found[0] if found else None)
    return found


def replace_file(path: Path, content: bytes) -> None:
    """Replace `path` with `content`: a reader sees the old or the new. Raises `OSError`."""
    unfinished = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        _write_synced(unfinished, content)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def what_is_kept(folder: Path) -> str:
    """Half a sentence for the end of a run: which checkpoint in `folder` is the newest."""
    kept = next((path.name for path in _newest_first(folder)), None)
    return f"the last whole checkpoint, {kept}, is kept" if kept else "there is no checkpoint yet"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in _serialised(tensors):
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
        return {"sha256": digest.hexdigest(), "bytes": file.tell()}


def _serialised(tensors: dict[str, Tensor]) -> Iterator[Any]:
    # The library's own writer either holds two more copies of everything or hides a full disk
    # behind its own error. The format: length of the header (8 bytes, little endian), JSON header,
    # then the tensors' bytes in its order.
    # Widest types first keeps every tensor aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, offset = {}, 0
    for name, tensor in ordered:
        span = [offset, offset + tensor.nbytes]
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read(path: Path, fingerprint: str) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    try:
        state = json.loads((path / STATE).read_bytes())
        step, facts, owner = state["step"], state["tensors"], state["fingerprint"]
        if owner != fingerprint:
            raise UsageError(
                f"{path} belongs to another run (fingerprint {owner}, this run has {fingerprint}):"
                " settings, data or model changed; choose another run folder, or remove this one"
                " to start over"
            )
        if step_name(step) != path.name:
            raise _DamagedError(f"{STATE} is of step {step}")
        size = (path / TENSORS).stat().st_size
        if size != facts["bytes"]:
            raise _DamagedError(f"{TENSORS} has {size} bytes instead of {facts['bytes']}")
        with (path / TENSORS).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                raise _DamagedError(f"{TENSORS} has another sha256")
        return step, load_file(path / TENSORS), state
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
        raise _DamagedError(f"{TENSORS}: {error}") from error


def _tidy(folder: Path, damaged: list[Path], step: int | None) -> None:
    try:
        for path in [*folder.glob("step-*.tmp-*"), *folder.glob(f"{LATEST}.tmp-*")]:
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


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refusal(error: OSError, folder: Path, what: str) -> str:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**20
    remedy = "free some space there" if error.errno in NO_SPACE else "make that folder writable"
    return (
        f"{what}: {error.strerror} in {folder}, where {free:.1f} MiB are free;"
        f" {what_is_kept(folder)}; {remedy} and run the same command"
    )
