"""How a command ends badly, and the words for it.

`__main__` makes the two errors one line and an exit code.
"""

import difflib
import json
from collections.abc import Iterable
from typing import Any


class UsageError(ValueError):
    """What was asked cannot be done (exit code 2): the message says what, where, what to do."""


class RunFailed(RuntimeError):
    """A run started and could not go on (exit code 1): the message says why and what is kept."""


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, or if it says nothing its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def closest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is most like `name`, None where none is."""
    by_lower = {other.lower(): other for other in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def nearest(name: str, names: Iterable[str]) -> str:
    """The words "; did you mean X?" when one of `names` is close to `name`, else nothing."""
    close = closest(name, names)
    return "" if close is None else f"; did you mean {close}?"


def show(value: Any) -> str:
    """A value as a recipe would write it, on one line of at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:76]} ..."
