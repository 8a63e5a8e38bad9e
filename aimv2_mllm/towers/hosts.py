"""A host's modules, or one line that says how to get the host, or a newer one; and the names of
transformers that hosts of its fourth release import."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from ..errors import UsageError

MOVED = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")


def host_modules(host: str, needs: Mapping[str, Sequence[str]]) -> list[Any]:
    """The modules of `host` that `needs` names, each with the names that are needed of it.

    UsageError where the host is not installed, lacks a library of its own, or is too old.
    """
    found = []
    for name, attributes in needs.items():
        package = name.partition(".")[0]
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] != package:
                raise UsageError(f"{host} needs {error.name}: pip install {error.name}") from None
            raise UsageError(
                f"there is no {error.name} here: pip install --no-deps -e CHECKOUT of {host}, or "
                "put that on PYTHONPATH"
            ) from None
        except ImportError as error:  # a host may print what went wrong below it, and go on
            raise UsageError(
                f"{host} cannot be imported with the libraries here ({error}): see what it has "
                "printed before this"
            ) from None
        for attribute in attributes:
            if not hasattr(module, attribute):
                raise UsageError(
                    f"what is here as {package} has no {name}.{attribute}: it is an old {host} "
                    "(git pull), or another package of that name (an environment for each)"
                )
        found.append(module)
    return found


def restore_names() -> None:
    """Put back the names that Q-Formers import of `transformers.modeling_utils`, where it has them
    no more (from 5.0 on). Two are elsewhere; the third only prunes heads, which nobody does."""
    utils, new = (import_module(f"transformers.{n}") for n in ("modeling_utils", "pytorch_utils"))
    for name in MOVED:
        if not hasattr(utils, name):
            setattr(utils, name, getattr(new, name, _gone(name)))


def _gone(name: str) -> Callable[..., None]:
    def gone(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"transformers has no {name} any more")

    return gone
