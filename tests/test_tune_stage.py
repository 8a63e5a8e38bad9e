"""Every way of tuning: what moves, what is held in which form, killed and resumed to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_corpus_run import Killed, die_in_step_5

from aimv2_mllm import run as runs
from aimv2_mllm.engine import metrics
from aimv2_mllm.job import Job, Place
from aimv2_mllm.recipe_file import load_recipe
from aimv2_mllm.stages import STAGES

RECIPE = """\
name: tuned
stages:
  tune:
    kind: tune
    start: {start}
    train: {{steps: 7, batch_size: 4, micro_batch_size: 2, lr: 3e-3, log_every: 1,
            checkpoint_every: 3}}
"""
MODES = {
    "connector": ["trains=connector"],
    "lora": [],
    "rslora": ["lora.rslora=true", "lora.dropout=0.1"],
    "dora": ["lora.dora=true"],
    "nf4": ["quantise=nf4"],
    "int8": ["quantise=int8"],
    "nf4, connector": ["quantise=nf4", "trains=connector"],
    "nf4, dora": ["quantise=nf4", "lora.dora=true"],
    "llm": ["trains=llm"],
    "tower": ["trains=connector", "tower_blocks=2", "train.part_lr={tower: 1e-3}"],
    "everything": ["trains=llm", "tower_blocks=all"],
}


@pytest.fixture(scope="module")
def start(tiny_run: Path) -> Path:
    """The folder of an aligned Llava."""
    return tiny_run / "align" / "model"


def recipe_of(folder: Path, start: Path, output: str, *words: str) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(start=start))
    said = [f"stages.tune.{word}" for word in words]
    return load_recipe(path, [f"output={folder / output}", *said])


def built(folder: Path, start: Path, *words: str) -> Job:
    recipe = recipe_of(folder, start, "built", *words)
    torch.manual_seed(0)
    stage = recipe.stages["tune"]
    return STAGES["tune"].build(stage, Place(recipe, recipe.output))


def run(folder: Path, start: Path, output: str, *words: str) -> list[str]:
    said: list[str] = []
    runs.run(recipe_of(folder, start, output, *words), said.append)
    return said


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "tune" / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in metrics.TIMED_FIELDS}
        for line in text
    ]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tune" / "model" / "stage.json").read_text())


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_goes_on_to_the_bit(
    tmp_path: Path, start: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, start, "whole", *MODES[mode])
    whole = lines(tmp_path / "whole")
    die_in_step_5(monkeypatch)
    with pytest.raises(Killed):
        run(tmp_path, start, "killed", *MODES[mode])
    monkeypatch.undo()
    assert "continuing from step 3" in run(tmp_path, start, "killed", *MODES[mode])
    assert lines(tmp_path / "killed") == whole
    assert record(tmp_path / "killed")["files"] == record(tmp_path / "whole")["files"]
    for file in ("whole", "killed"):
        assert any((tmp_path / file / "tune" / "checkpoints").iterdir())


def losses(job: Job, num_steps: int = 8) -> list[float]:
    """The loss of one batch, step after step on it alone."""
    batch = job.batches(0)[0]
    batch.pop("skipped", None)
    trained = [p for named in job.parts.values() for _, p in named]
    optimizer, found = torch.optim.AdamW(trained, lr=3e-3), []
    for _ in range(num_steps):
        total = job.objective(job.model, batch, job.objective.targets(batch)).total
        optimizer.zero_grad()
        total.backward()
        assert not [
            n for n, p in job.model.named_parameters() if p.requires_grad != (p.grad is not None)
        ]
        optimizer.step()
        found.append(float(total.detach()))
    return found


@pytest.mark.parametrize("mode", MODES)
def test_what_is_trained_is_what_moves_and_it_learns(
    tmp_path: Path, start: Path, mode: str
) -> None:
    job = built(tmp_path, start, *MODES[mode])
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    declared = {name: p for named in job.parts.values() for name, p in named}
    found = losses(job)
    assert found[-1] < 0.9 * found[0]
    moved = {n for n, p in job.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == declared.keys()
    assert {p.dtype for p in declared.values()} == {torch.float32}
