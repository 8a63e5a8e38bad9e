"""A folder written whole or not at all: under another name, synced, then renamed."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from aimv2_mllm.engine.disk import sync
from aimv2_mllm.errors import UsageError
from aimv2_mllm.export.answers import SIDECAR
from aimv2_mllm.files import sha256
from aimv2_mllm.folders import CARD_FILE, STAGE_FILE
from aimv2_mllm.model.shards import INDEX_FILE, WEIGHTS_FILE, num_bytes, write_json, write_tensors

LARGE = 10**8  # bytes from which a bar is shown
NOT_COPIED = (WEIGHTS_FILE, INDEX_FILE, STAGE_FILE, CARD_FILE, SIDECAR)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """The folder to write, which becomes `destination` when all is well and is gone when not.

    UsageError for a destination that is in use, and where the disk refuses.
    """
    if os.path.lexists(destination) and not destination.is_dir():
        raise UsageError(f"{destination}: is a file; give a new folder")
    if destination.is_dir() and any(destination.iterdir()):
        raise UsageError(f"{destination}: is not empty; give a new folder, or remove this one")
    unfinished = destination.with_name(f".{destination.name}.part")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with _held(unfinished, destination):
            try:
                _empty(unfinished)  # of what a process left that was killed
                yield unfinished
                for file in (path for path in unfinished.rglob("*") if path.is_file()):
                    file.chmod(0o644)  # safetensors writes for the owner alone
                    sync(file)
                sync(unfinished)
                unfinished.rename(destination)
                sync(destination.parent)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"{destination}: cannot be written ({said})") from None


@contextmanager
def _held(unfinished: Path, destination: Path) -> Iterator[None]:
    """Hold the folder `unfinished` against a second process, as long as this one lives."""
    handle = os.open(unfinished, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{destination}: another process is writing it; wait for that, or give a new folder"
            ) from None
        yield
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def demand_room(destination: Path, needed: int) -> None:
    """UsageError where the disk of `destination` has fewer than `needed` bytes left."""
    above = next(path for path in (destination, *destination.absolute().parents) if path.exists())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise UsageError(
            f"{destination}: {needed / 1e9:.1f} GB are to be written, and {free / 1e9:.1f} GB are "
            "free: give a folder on another disk"
        )


def write_weights(
    state: Mapping[str, Tensor], folder: Path, *, destination: Path, dtype: Any, most: int | None
) -> None:
    """Write `state` as safetensors, floating point as `dtype`, with a bar where it takes long.

    UsageError, before anything is written, where it does not fit on the disk.
    """
    from tqdm import tqdm

    total = sum(num_bytes(tensor, dtype) for tensor in state.values())
    demand_room(destination, total)
    shown = None if total > LARGE else True  # None: where a terminal is there to show it
    with tqdm(total=total, disable=shown, unit="B", unit_scale=True, leave=False) as bar:
        write_tensors(state, folder, dtype=dtype, most=most, wrote=bar.update)


def copy_files(
    source: Path, target: Path, wanted: Callable[[str], bool] = lambda name: True
) -> None:
    """Copy what lies in `source` beside weights, records and cards: configs, tokenizer, licence."""
    for path in sorted(source.iterdir()):
        is_weight = path.name.endswith((".safetensors", ".bin", ".part"))
        if path.is_file() and not is_weight and path.name not in NOT_COPIED and wanted(path.name):
            shutil.copyfile(path, target / path.name)


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file in `folder` and below it, but for the sidecar, by its path there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: sha256(path) for name, path in named.items() if name != SIDECAR}


def write_sidecar(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `content` and the digests of all other files to the sidecar: the last thing written."""
    write_json(folder / SIDECAR, {**content, "files": digests(folder)})
