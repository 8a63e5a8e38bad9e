"""The tensors of a folder: one `model.safetensors`, or shards with their index, whole or refused.

Refuses a file that is cut off, a shard that is missing, an index that does not say what its shards
hold, and a folder that has both forms.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..disk import replace_file
from ..errors import UsageError
from .namings import State

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# By the names of recipes and of the command line.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHARD_BYTES = 5 * 10**9  # as transformers and the hub cut


def type_name(precision: str) -> str:
    """What torch and transformers call one of `PRECISIONS`: bfloat16 for bf16."""
    return str(PRECISIONS[precision]).removeprefix("torch.")


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights of `folder`: the one, or the index and its shards.

    Raises UsageError where they are not all there.
    """
    if not (folder / INDEX_FILE).is_file():
        if not (folder / WEIGHTS_FILE).is_file():
            raise UsageError(
                f"{folder} has no {WEIGHTS_FILE} and no {INDEX_FILE}: weights are read from "
                "safetensors files of these names alone"
            )
        return [folder / WEIGHTS_FILE]
    if (folder / WEIGHTS_FILE).is_file():
        raise UsageError(
            f"{folder} has both {WEIGHTS_FILE} and {INDEX_FILE}: remove the one that is old"
        )
    shards = sorted(set(_read_index(folder).values()))
    absent = [name for name in shards if not (folder / name).is_file()]
    if absent:
        raise UsageError(f"{folder} lacks {', '.join(absent)}, which {INDEX_FILE} names")
    return [folder / INDEX_FILE, *(folder / name for name in shards)]


def read_tensors(folder: Path) -> State:
    """Every tensor of `folder` by its name, on the CPU and mapped into memory, in its own dtype.

    Raises UsageError, with the name of the tensor or file, for weights that are not whole.
    """
    first, *shards = weight_files(folder)
    if not shards:
        return _read_file(first)
    index, state = _read_index(folder), State()
    for path in shards:
        tensors = _read_file(path)
        absent = [n for n, shard in index.items() if shard == path.name and n not in tensors]
        if absent:
            raise UsageError(f"{first}: says that {absent[0]} is in {path.name}, and it is not")
        for name in tensors:
            if index.get(name) != path.name:
                said = f"in {index[name]}" if name in index else "nowhere"
                raise UsageError(f"{path}: has {name}, which {INDEX_FILE} says is {said}")
        state |= tensors
    return state


def write_tensors(
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    most: int | None = None,
    wrote: Callable[[int], object] = lambda size: None,
) -> None:
    """Write `state` to `folder` as one file, or as shards of `most` bytes (MAX_SHARD_BYTES) with an
    index.

    What is of floating point becomes `dtype`, a shard at a time, so that no second copy of all of
    it is held; `wrote` is told how many bytes each file had. Each file is written under another
    name and then renamed, for what is saved may be mapped from the old ones. Older weights of the
    other form are removed.
    """
    sizes = {name: num_bytes(tensor, dtype) for name, tensor in state.items()}
    shards = _plan(sizes, most or MAX_SHARD_BYTES)
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        part = folder / f"{name}.part"
        tensors = {n: _as(state[n], dtype).contiguous() for n in shard}
        save_file(tensors, part, metadata={"format": "pt"})
        wrote(sum(sizes[n] for n in shard))
    for name in names:
        os.replace(folder / f"{name}.part", folder / name)
    if len(shards) > 1:
        weight_map = {n: name for name, shard in zip(names, shards, strict=True) for n in shard}
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / INDEX_FILE, content)
        names.append(INDEX_FILE)
    # Last: whoever is stopped before has both forms, which is refused, and has lost nothing.
    stale = {*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS_FILE, folder / INDEX_FILE}
    for path in stale - {folder / name for name in names}:
        path.unlink(missing_ok=True)


def demand_fit(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str | Path
) -> None:
    """UsageError naming what in `state` is missing, left over or not shaped as `expected`."""
    faults = [f"{name} is missing" for name in expected if name not in state]
    faults += [f"{name} is left over" for name in state if name not in expected]
    faults += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults += [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}, which is no floating-point type"
        for name, tensor in state.items()
        if name in expected and not tensor.is_floating_point()
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UsageError(
            f"{where}: its weights do not fit its config.json: {'; '.join(faults[:5])}{more}"
        )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path`, whole or not at all."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """The hash of all tensors by name: equal for equal weights, however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def num_bytes(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """How many bytes `tensor` takes as `write_tensors` writes it."""
    if dtype is None or not tensor.is_floating_point():
        return tensor.numel() * tensor.element_size()
    return tensor.numel() * torch.empty((), dtype=dtype).element_size()


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _plan(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """The names in their order, cut where a shard would pass `most` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _read_index(folder: Path) -> dict[str, str]:
    """The shard of each tensor; UsageError for an index that is none, or leads out of `folder`."""
    path = folder / INDEX_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
        shards: dict[str, str] = dict(content["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not an index of shards ({error}): download it again") from None
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UsageError(f"{path}: {shard!r} is not the name of a file beside it")
    return shards


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(n for n in names if names.count(n) > 1)} twice")
    return found


def _read_file(path: Path) -> State:
    try:
        state: State = load_file(path)
        return state
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is cut off or not a safetensors file ({error}): download it again"
        ) from None
