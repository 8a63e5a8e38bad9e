"""Our connectors under LLaVA's `--mm_projector_type`: see `words` for how they are typed."""

import re
from collections.abc import Collection
from typing import Any

from ..model.connectors import Connector, build_connector
from .words import read_connector

# LLaVA's own, of any depth. Of `linear` both have one, with the same weights, and LLaVA's stays.
OWN = ("linear", "mlp2x_gelu", "identity")
_OWN = re.compile(r"linear|identity|mlp[1-9]\d*x_gelu")


def build_projector(
    config: Any, own: Collection[str] = OWN, pattern: re.Pattern[str] = _OWN
) -> Connector | None:
    """The connector that LLaVA's `config` names, or None where it is one of LLaVA's `own`, also of
    another depth, as `pattern` has them; UsageError for a name or an option that nobody has."""
    words = getattr(config, "mm_projector_type", "linear")
    chosen = None if pattern.fullmatch(words) else read_connector(words, own)
    if chosen is None:
        return None
    name, options = chosen
    return build_connector(name, config.mm_hidden_size, config.hidden_size, **options)
