"""An index as columns of numbers, a value for each row: its digest, its way to a sidecar and back.

A sidecar says which file it is of: what is damaged or of another file is as good as none.
"""

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from aimv2_mllm.data.files import read_at
from aimv2_mllm.disk import replace_file

INDEX_ENDING = ".index.safetensors"
Columns = dict[str, np.ndarray]  # (rows,) each
Facts = dict[str, str]


def digest_of(columns: Columns) -> str:
    """What two equal indices have in common."""
    content = b"".join(column.tobytes() for column in columns.values())
    return hashlib.sha256(content).hexdigest()[:32]


def save_columns(paths: Iterable[Path], columns: Columns, facts: Facts) -> None:
    """Write the index to the first of `paths` that can be written, where there is one."""
    content = save(columns, facts | {"digest": digest_of(columns)})
    for path in paths:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content)
            return


def load_columns(
    path: Path, kinds: Mapping[str, type], stamp: Facts
) -> tuple[Columns, Facts] | None:
    """The columns of `kinds` in `path`, and its facts, `stamp` among them; None where there are
    none, damaged ones, or those of another file."""
    try:
        if not path.is_file():
            return None
        with safe_open(path, "np") as file:
            facts = dict(file.metadata() or {})
            columns = {name: file.get_tensor(name) for name in kinds}
    except (OSError, SafetensorError):
        return None
    shapes = {column.shape for column in columns.values()}
    is_whole = len(shapes) == 1 and all(columns[n].dtype == kind for n, kind in kinds.items())
    is_ours = facts.items() >= (stamp | {"digest": digest_of(columns)}).items()
    return (columns, facts) if is_whole and is_ours else None


def is_of(descriptor: int, crcs: np.ndarray, offsets: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether the first and the last row of the open file stand where an index of it says."""
    return all(
        zlib.crc32(read_at(descriptor, int(offsets[row]), int(sizes[row]))) == crcs[row]
        for row in {0, len(crcs) - 1}
        if len(crcs)
    )
