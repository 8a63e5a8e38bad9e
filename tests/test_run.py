"""The run folder: taken up where it was left, to the bit; never mixed with another recipe."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny_recipe

from aimv2_mllm import run as runs
from aimv2_mllm.engine.metrics import TIMED_FIELDS
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.recipe import dump_recipe

STAGES = ("pretrain", "align", "tune")


def metrics(folder: Path, stage: str) -> list[dict[str, object]]:
    lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED_FIELDS} for line in lines]


def files(folder: Path, stage: str) -> dict[str, str]:
    record = json.loads((folder / stage / "model" / "stage.json").read_text())
    return dict(record["files"])


def test_two_runs_of_a_recipe_are_equal_to_the_bit(tiny_run: Path, tmp_path: Path) -> None:
    again = runs.run(tiny_recipe(tmp_path / "again"), lambda _: None)
    for stage in STAGES:
        assert metrics(again, stage) == metrics(tiny_run, stage)
        assert len(metrics(again, stage)) == 3
        assert files(again, stage) == files(tiny_run, stage)


def test_another_seed_is_another_run(tiny_run: Path, tmp_path: Path) -> None:
    other = runs.run(tiny_recipe(tmp_path / "other", "seed=1"), lambda _: None)
    assert metrics(other, "pretrain")[0]["text"] != metrics(tiny_run, "pretrain")[0]["text"]


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_ends_with_equal_metrics(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(folder)))
    command = [sys.executable, "-m", "aimv2_mllm", "run", str(recipe)]
    moments = random.Random(5)
    begun = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "AIMV2_PROBE": ""})
    whole = time.monotonic() - begun
    subprocess.run(["rm", "-r", str(folder)], check=True)
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        time.sleep(whole * moments.uniform(0.4, 0.95))
        process.send_signal(number)
        process.communicate(timeout=60)
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for stage in STAGES:
        assert metrics(folder, stage) == metrics(tiny_run, stage)
        assert files(folder, stage) == files(tiny_run, stage)


def test_a_finished_stage_is_not_run_twice(tiny_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}
    said: list[str] = []
    runs.run(tiny_recipe(tiny_run), said.append)
    after = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}
    before.pop(tiny_run / ".lock")
    after.pop(tiny_run / ".lock")
    assert after == before
    assert [line for line in said if "finished" in line and line.startswith("stage")] == said


def test_a_changed_recipe_is_refused_and_the_changed_keys_are_named(tiny_run: Path) -> None:
    changed = tiny_recipe(tiny_run, "stages.tune.train.lr=0.5", "seed=3")
    with pytest.raises(UsageError) as error:
        runs.run(changed, lambda _: None)
    assert "stages.tune.train.lr: 0.002 -> 0.5" in str(error.value)
    assert "seed: 0 -> 3" in str(error.value)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with (
        runs._locked(tmp_path),
        pytest.raises(UsageError, match="another process"),
        runs._locked(tmp_path),
    ):
        pass


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be the run folder"):
        runs.run(tiny_recipe(tmp_path / "file" / "run"), lambda _: None)


def test_a_result_that_cannot_be_written_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_sync", full)
        with pytest.raises(RunFailed, match="No space left"):
            runs.run(tiny_recipe(tmp_path / "run"), lambda _: None)
    assert not list((tmp_path / "run" / "pretrain").glob("model*"))
    assert (tmp_path / "run" / "pretrain" / "checkpoints" / "latest").is_file()
    said: list[str] = []
    runs.run(tiny_recipe(tmp_path / "run"), said.append)
    assert "continuing from step 3" in said
