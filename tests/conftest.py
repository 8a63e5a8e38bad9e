"""A quickstart in miniature, run once for all tests that look at its results."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch: shapes are tiny here, and equal bits need equal numbers of threads in every process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A process that a shell starts in the background ignores Ctrl-C, which tests send to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from aimv2_mllm.model import hub
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.recipe.schema import Recipe

RECIPES = Path(__file__).parents[1] / "recipes"


def tiny_recipe(output: Path, *overrides: str) -> Recipe:
    """The real quickstart recipe, with so few steps that a test can wait for it."""
    words = [f"output={output}", "evaluation=null"]
    for stage in ("pretrain", "align", "tune"):
        train = f"stages.{stage}.train"
        words += [f"{train}.steps=3", f"{train}.batch_size=4", f"{train}.micro_batch_size=null"]
        words += [f"{train}.warmup_steps=0"]
        words += [f"{train}.log_every=1", f"{train}.checkpoint_every=2"]
        words += [f"{train}.micro_batch_size=null"]
    return load_recipe(RECIPES / "quickstart.yaml", [*words, *overrides])


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished quickstart of three steps a stage."""
    from aimv2_mllm.runs.run import run

    return run(tiny_recipe(tmp_path_factory.mktemp("run") / "quickstart"), lambda _: None)


@pytest.fixture(autouse=True)
def no_commits() -> Iterator[None]:
    """A process remembers the commits of the hub's models: not from one test to the next."""
    hub.COMMITS.clear()
    yield
    hub.COMMITS.clear()


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that puts a copy of a folder among what was downloaded from the hub, which cannot
    be reached: under an org/name, as its newest commit, without the record of its stage."""
    import huggingface_hub.constants as constants

    def put(source: Path, name: str, commit: str) -> Path:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        folder = shutil.copytree(source, repository / "snapshots" / commit)
        (folder / "stage.json").unlink(missing_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return folder

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return put
