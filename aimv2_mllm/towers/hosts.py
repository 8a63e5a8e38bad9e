"""A host's modules, or one line that says how to get the host, or a newer one."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from ..errors import UsageError


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
        for attribute in attributes:
            if not hasattr(module, attribute):
                raise UsageError(
                    f"{host} here has no {name}.{attribute}: update the checkout (git pull)"
                )
        found.append(module)
    return found
