"""What is put into an exported folder: weights, what lies beside them, and the sidecar."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from aimv2_mllm.errors import UsageError
from aimv2_mllm.export.answers import SIDECAR
from aimv2_mllm.files import sha256
from aimv2_mllm.folders import CARD_FILE, STAGE_FILE
from aimv2_mllm.model.shards import INDEX_FILE, WEIGHTS_FILE, num_bytes, write_json, write_tensors

LARGE = 10**8  # bytes from which a bar is shown
NOT_COPIED = (WEIGHTS_FILE, INDEX_FILE, STAGE_FILE, CARD_FILE, SIDECAR)


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
