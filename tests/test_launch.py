"""A real pre-training by the launchers that people use: killed, asked to stop, started wrongly."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from benchmarks.preemption import (
    RECIPE,
    Way,
    at_step,
    disturbed,
    finished,
    largest_difference,
    lines,
    started,
    wait_for,
)

pytestmark = pytest.mark.slow
ALONE, DDP, FSDP2 = Way(1, "auto"), Way(2, "ddp"), Way(2, "fsdp2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, undisturbed."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    finished(folder, ALONE)
    return folder


def test_killed_and_gone_on_with_on_other_ranks_it_ends_as_one_process_does(
    tmp_path: Path, alone: Path
) -> None:
    killed_at = disturbed(tmp_path / "run", [DDP, FSDP2, ALONE], 3, random.Random(0))
    assert len(killed_at) == 3
    assert largest_difference(lines(tmp_path / "run"), lines(alone)) < 1e-5


def test_one_worker_asked_to_stop_saves_and_ends_the_run(tmp_path: Path, alone: Path) -> None:
    folder = tmp_path / "run"
    process = started(folder, DDP)
    wait_for(process, folder, 4)
    workers = psutil.Process(process.pid).children()
    workers[-1].send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1, said  # torchrun's own
    assert "exitcode  : 143" in said
    assert said.count("stopped after step") == 1
    assert lines(folder)[-1]["step"] == at_step(folder)
    assert lines(folder) == pytest.approx(lines(alone)[: at_step(folder)], abs=1e-5, rel=1e-5)


def test_a_killed_worker_ends_the_other_with_one_clear_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = started(folder, DDP)
    wait_for(process, folder, 4)
    start = time.monotonic()
    psutil.Process(process.pid).children()[-1].kill()
    said = process.communicate(timeout=120)[0]
    assert time.monotonic() - start < 60
    assert process.returncode == 1
    assert said.count("another of the 2 ranks ended, or did not answer") == 1, said
    assert "Traceback" not in said.partition("aimv2-mllm: ")[0]


def test_a_batch_that_ranks_cannot_share_is_refused_once(tmp_path: Path) -> None:
    process = started(tmp_path / "run", DDP, "stages.pretrain.train.batch_size=5")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    rule = "stages.pretrain.train.batch_size is 5, which 2 processes cannot share evenly; 4 or 6"
    assert said.count(rule) == 1, said
    assert "exitcode  : 2" in said


def test_accelerate_launch_starts_it_too(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    words = [f"output={tmp_path / 'run'}", "stages.pretrain.train.steps=2"]
    words += ["stages.pretrain.train.warmup_steps=0", "stages.pretrain.train.strategy=fsdp2"]
    command = [sys.executable, *launcher, "-m", "aimv2_mllm", "run", str(recipe), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(lines(tmp_path / "run")) == 2
    sharded = "tensors-1-of-2.safetensors"
    assert (tmp_path / "run" / "pretrain" / "checkpoints" / "step-000002" / sharded).is_file()
