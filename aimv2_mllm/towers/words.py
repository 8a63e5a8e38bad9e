"""The words by which a host's user asks for our parts: a tower `aimv2:SOURCE` (see `sources`), a
connector `pixel_shuffle:factor=2`.

A host's own names stay the host's, but for those that it would silently take for something else:
AIMv2 weights without the prefix, and a prefix that is nearly one of ours. Where a host has a
connector of the same name, `aimv2:resampler` is ours.
"""

from collections.abc import Collection
from os.path import isdir
from pathlib import Path

import torch

from ..errors import UsageError, closest, nearest
from ..model.connectors import CONNECTORS, Connector, build_connector
from ..model.grids import Grid
from ..model.layouts import load_config
from .sources import SOURCES, is_source

OURS = "aimv2:"


def is_ours(name: object, host: str) -> bool:
    """Whether the tower `name` is meant for us; UsageError where AIMv2 is meant and `host` would
    build something else."""
    if is_source(name):
        return True
    if not isinstance(name, str):
        return False
    kind, colon, rest = name.partition(":")
    if colon and not isdir(name) and (meant := closest(kind, SOURCES)):
        raise UsageError(
            f"vision tower {name!r} begins with {kind}:; did you mean {meant}? Type {meant}:{rest}"
        )
    if _is_aimv2(Path(name)) if isdir(name) else "aimv2" in name:
        raise UsageError(
            f"vision tower {name} is AIMv2's, and {host} would build another model of it: "
            f"type {OURS}{name}"
        )
    return False


def read_connector(words: object, own: Collection[str] = ()) -> tuple[str, dict[str, int]] | None:
    """The name and the options of a connector as it is typed; None for a name of the host's `own`.

    UsageError for a name or an option that is neither.
    """
    if not isinstance(words, str):
        return None
    name, _, rest = words.removeprefix(OURS).partition(":")
    if not words.startswith(OURS) and words in own:
        return None
    if name not in CONNECTORS:
        known = [*dict.fromkeys((*own, *CONNECTORS))]
        raise UsageError(
            f"connector is {words!r}, and must be one of {', '.join(known)}{nearest(name, known)}"
        )
    options = {}
    for word in filter(None, rest.split(",")):
        option, equals, value = word.partition("=")
        if not equals or not value.isdecimal():
            raise UsageError(
                f"connector {words!r}: {word!r} is no option=NUMBER, as in {name}:factor=2"
            )
        options[option] = int(value)
    return name, options


def count_tokens(name: str, options: dict[str, int], in_features: int, grid: Grid) -> int:
    """How many tokens a connector makes of `grid`; UsageError where it cannot serve it."""
    with torch.device("meta"):
        connector: Connector = build_connector(name, in_features, in_features, **options)
    return connector.num_tokens(grid)


def _is_aimv2(folder: Path) -> bool:
    try:
        load_config(folder)
    except UsageError:
        return False
    return True
