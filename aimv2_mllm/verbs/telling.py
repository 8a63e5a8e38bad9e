"""The program's own words: what it is called, and how it ends."""

import sys
from collections.abc import Sequence
from pathlib import Path

from aimv2_mllm.errors import UsageError
from aimv2_mllm.narration import PROGRAM


def program() -> str:
    """The words that call this program again, as they were typed."""
    import shlex
    import shutil

    script = Path(sys.argv[0])
    if script.stem != PROGRAM:
        return "python -m aimv2_mllm"
    found = shutil.which(PROGRAM)
    on_path = found is not None and Path(found).absolute() == script.absolute()
    return PROGRAM if on_path else shlex.quote(str(script))


def end_with(problems: Sequence[object]) -> None:
    """UsageError with all of the problems, a line each; a line of its own where there is none."""
    if problems:
        sys.stdout.flush()
        raise UsageError("\n".join(map(str, problems)))
    print("no problem found")
