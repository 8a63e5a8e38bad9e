"""What a program says beside its output."""

import sys
from collections.abc import Callable

Narrate = Callable[[str], None]


def note(text: str) -> None:
    """Say `text` on stderr."""
    print(text, file=sys.stderr, flush=True)
