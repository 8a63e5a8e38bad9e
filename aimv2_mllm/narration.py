"""What a program says beside its output."""

import sys
from collections.abc import Callable

PROGRAM = "aimv2-mllm"
Narrate = Callable[[str], None]


def note(text: str) -> None:
    """Say `text` on stderr."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Say `text` on stderr in the program's name, which each of its lines begins with."""
    note("\n".join(f"{PROGRAM}: {line}" for line in text.splitlines()))
