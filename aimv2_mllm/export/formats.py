"""One table: the formats in which a result goes out, and what each takes; and the way to all."""

import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from aimv2_mllm.errors import UsageError
from aimv2_mllm.export.adapter import write_adapter
from aimv2_mllm.export.card import write_card
from aimv2_mllm.export.encoder import write_encoder
from aimv2_mllm.export.llava import write_llava
from aimv2_mllm.export.options import Options, size_in_bytes
from aimv2_mllm.export.original import write_original
from aimv2_mllm.export.source import ExportSource
from aimv2_mllm.export.writing import write_sidecar
from aimv2_mllm.files import new_folder
from aimv2_mllm.model.shards import type_name

MINIMUM = "5.18"  # the first transformers that reads tie_last_hidden_states


class Format(NamedTuple):
    """`write` puts the format's files into a folder, and returns where they came from and what the
    sidecar says of them; `takes` are the options that mean something to it."""

    write: Callable[[str, Path, Options], tuple[ExportSource, dict[str, Any]]]
    takes: tuple[str, ...]


FORMATS: dict[str, Format] = {
    "llava": Format(write_llava, ("dtype", "max-shard-size")),
    "adapter": Format(write_adapter, ()),
    "original-llava": Format(write_original, ("max-shard-size",)),
    "encoder": Format(write_encoder, ("dtype", "layout")),
}


def export(
    run: str,
    destination: Path,
    *,
    format_: str,
    narrate: Callable[[str], None],
    chosen: dict[str, str | None],
) -> str:
    """Write what `run` made to the new folder `destination`, with a model card and the sidecar by
    which `verify-export` judges it; what was written, in two lines.

    `chosen` has the options dtype, max-shard-size and layout by name, None where not given. Raises
    UsageError, and leaves nothing behind, where it cannot be done.
    """
    kind = FORMATS[format_]
    wrong = [name for name, value in chosen.items() if value is not None and name not in kind.takes]
    if wrong:
        raise UsageError(f"--{wrong[0]} means nothing to --format {format_}: leave it out")
    size, dtype = chosen["max-shard-size"], chosen["dtype"]
    destination = Path(os.path.abspath(destination))
    options = Options(
        destination,
        narrate,
        dtype_name=None if dtype is None else type_name(dtype),
        most_bytes=None if size is None else size_in_bytes(size),
        layout=chosen["layout"],
    )
    with new_folder(destination) as folder:
        source, told = kind.write(run, folder, options)
        content = {
            "format": format_,
            "made_by": f"aimv2-mllm {version('aimv2-mllm')}",
            "min_transformers": MINIMUM,
            "licence": source.licence,
            "origins": source.origins,
            **{key: source.record.get(key) for key in ("stage", "kind", "seed", "fingerprint")},
            "versions": source.record.get("versions"),
            "dtype": options.dtype_name,
            "image_token": source.config.get("image_token_index"),
            **told,
        }
        write_card(folder, source, content, name=destination.name)
        write_sidecar(folder, content)
        total = sum(file.stat().st_size for file in folder.rglob("*"))
    return f"wrote {destination}: {format_}, {total / 1e6:,.1f} MB\nlicence: {source.licence}"
