"""The virtual environment in which lmms-eval runs: a thin layer over the one that runs this.

Owns what is installed there (`assets/lmms_eval.txt`, every version pinned) and how it sees the
rest: torch, transformers and this package stay those of the environment below, and are not touched.
An environment that was not made here is used as it is.

`python -m aimv2_mllm.lmms.environment FOLDER` makes one.
"""

import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aimv2_mllm.errors import UsageError
from aimv2_mllm.lmms.plugin import MODEL
from aimv2_mllm.narration import Narrate, note, warn

REQUIREMENTS = Path(__file__).parents[1] / "assets" / "lmms_eval.txt"
BELOW, INSTALLED = "below.pth", "lmms_eval.txt"
EXTRA = "pip install 'aimv2-mllm[evaluate]'"


class Inventory(NamedTuple):
    """What the lmms-eval of an environment has."""

    version: str
    tasks: frozenset[str]  # groups and tags too


def python_of(folder: Path) -> Path:
    """Its interpreter, there or not."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def demand_environment(folder: Path, narrate: Narrate) -> Path:
    """The interpreter of the environment in `folder`, which is made where there is none.

    UsageError where it cannot be: the folder is something else, or packages cannot be had.
    """
    python = python_of(folder)
    if folder.exists() and not python.exists():
        raise UsageError(f"{folder}: is there and is no virtual environment; give another")
    if not python.exists():
        narrate(f"making {folder}, once")
        _call([sys.executable, "-m", "venv", str(folder)], f"{folder}: cannot be made")
        _layer(python)
    elif not _layer_file(python).exists():
        return python  # somebody else's
    if not _is_installed(folder):
        narrate(f"installing what {REQUIREMENTS.name} names into {folder}")
        options = ["--disable-pip-version-check", "--no-deps", "-q", "-r", str(REQUIREMENTS)]
        _call(
            [str(python), "-m", "pip", "install", *options],
            f"{folder}: lmms-eval cannot be installed; the same command goes on, or give "
            "--environment with one that has it",
        )
        (folder / INSTALLED).write_bytes(REQUIREMENTS.read_bytes())
    return python


def _is_installed(folder: Path) -> bool:
    file = folder / INSTALLED
    return file.exists() and file.read_bytes() == REQUIREMENTS.read_bytes()


def _layer_file(python: Path) -> Path:
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    inside = python.parents[1]
    libraries = inside / "Lib" if sys.platform == "win32" else inside / "lib" / name
    return libraries / "site-packages" / BELOW


def _layer(python: Path) -> None:
    """Let the environment see what this one has, behind its own."""
    paths = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    # Not the paths themselves: packages installed editable stand in .pth files of their own there.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in paths]
    _layer_file(python).write_text("".join(lines), encoding="utf-8")


def inventory(python: Path, include: str | None) -> Inventory:
    """What lmms-eval there has, tasks in the folder `include` too; UsageError where it is not
    there or does not know our models."""
    command = [str(python), "-m", "aimv2_mllm.lmms.inventory", *([include] if include else [])]
    told = _call(command, f"{python}: lmms-eval does not start").splitlines()
    found = json.loads(told[-1])
    if MODEL not in found["models"]:
        raise UsageError(
            f"{python}: its lmms-eval {found['version']} does not find {MODEL}: install this "
            "package again where it comes from (pip install -e .), for its entry point is new"
        )
    return Inventory(found["version"], frozenset(found["tasks"]))


def _call(command: Sequence[str], what: str) -> str:
    """What a command prints; UsageError with the last line that says why, where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UsageError(f"{what} ({command[0]}: {error.strerror})") from None
    if done.returncode:
        raise UsageError(f"{what} ({_why(done.stderr + done.stdout)})")
    return done.stdout


def _why(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if any("after connection broken by" in line for line in lines):  # pip's words
        return "the package index cannot be reached"
    missing = [line for line in lines if "No module named" in line]
    if missing:
        return f"{missing[-1]}: {EXTRA}"
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["it says nothing"]
    return errors[-1][:300]


if __name__ == "__main__":
    try:
        demand_environment(Path(sys.argv[1]), note)
    except UsageError as error:
        warn(str(error))
        sys.exit(1)
