"""Hosts that are on no index: their checkouts, and an interpreter of theirs, by the environment."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def checkout_of(name: str) -> tuple[Path, str]:
    """The checkout of the host `name` and the interpreter that runs it; skips where there is none.

    They come from AIMV2_TEST_NAME and AIMV2_TEST_NAME_PYTHON; the latter is this one by default.
    """
    variable = f"AIMV2_TEST_{name.upper()}"
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"no checkout of {name}: give its folder in {variable}")
    if not Path(folder).is_dir():
        pytest.fail(f"{variable} is {folder}, which is no folder")
    return Path(folder), os.environ.get(f"{variable}_PYTHON", sys.executable)


def run_host(name: str, *words: str | Path) -> dict[str, Any]:
    """What `tests/hosts/in_NAME.py` prints as its last line, run in the host's checkout."""
    folder, python = checkout_of(name)
    paths = [HERE.parent, HERE, folder, os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",  # a checkout is read, and not written to
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [python, HERE / "hosts" / f"in_{name}.py", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        pytest.fail(
            f"{name} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
