"""Our connectors under LLaVA's `--mm_projector_type`: a name of CONNECTORS, with options behind it,
as in `pixel_shuffle:factor=2` or `c_abstractor:target=6,depth=2`."""

import re
from typing import Any

from ..errors import UsageError, nearest
from ..model.connectors import CONNECTORS, Connector, build_connector

# LLaVA's own; of `linear` both have one, with the same weights, and LLaVA's stays.
STOCK = ("linear", "mlp2x_gelu", "identity")
_STOCK = re.compile(r"linear|identity|mlp[1-9]\d*x_gelu")
OWN = tuple(name for name in CONNECTORS if name not in STOCK)


def build_projector(config: Any) -> Connector | None:
    """The connector that LLaVA's `config` names, or None where it is one of LLaVA's own; UsageError
    for a name or an option that nobody has."""
    words = getattr(config, "mm_projector_type", "linear")
    if _STOCK.fullmatch(words):
        return None
    name, options = read_words(words)
    return build_connector(name, config.mm_hidden_size, config.hidden_size, **options)


def read_words(words: str) -> tuple[str, dict[str, int]]:
    """The name and the options of a connector as it is typed."""
    name, _, rest = words.partition(":")
    if name not in OWN:
        known = (*STOCK, *OWN)
        raise UsageError(
            f"mm_projector_type is {words!r}, and must be one of {', '.join(known)}"
            f"{nearest(name, known)}"
        )
    options = {}
    for word in filter(None, rest.split(",")):
        option, equals, value = word.partition("=")
        if not equals or not value.isdecimal():
            raise UsageError(
                f"mm_projector_type {words!r}: {word!r} is no option=NUMBER, as in {name}:factor=2"
            )
        options[option] = int(value)
    return name, options
