"""Kill a run again and again, go on with it each time, and compare with one that nobody disturbed.

    python tests/benchmarks/preemption.py [--kills 10] [--seed 0] [--folder FOLDER]

The run is a real pre-training of a tiny encoder under `torchrun`; it is killed with SIGKILL, all of
its processes at once: every other time at a random moment, every other time while a checkpoint is
being written. Half of the kills hit a run of always 2 ranks, which must end equal to the bit; half
one that goes on with 2 and 1 ranks and either strategy, which must end within 1e-5.

On 2 CPU cores: not yet run without other load.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from aimv2_mllm.engine.metrics import TIMED_FIELDS

STEPS = 60
RECIPE = f"""\
name: tiny
stages:
  pretrain:
    kind: pretrain
    encoder: {{size: aimv2_nano, image_size: 28}}
    decoder: {{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2,
              num_attention_heads: 2, max_text_tokens: 32}}
    tokenizer: tiny_llm
    train: {{steps: {STEPS}, batch_size: 8, micro_batch_size: 2, lr: 3.0e-4, warmup_steps: 5,
            log_every: 1, checkpoint_every: 2, device: cpu}}
"""


class Way(NamedTuple):
    """How a run is executed: on how many ranks, under which strategy."""

    ranks: int
    strategy: str


def started(folder: Path, way: Way, *words: str) -> subprocess.Popen[str]:
    """The run in `folder`, begun or gone on with."""
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(RECIPE)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(way.ranks)]
    command = [sys.executable, *(launcher if way.ranks > 1 else [])]
    command += ["-m", "aimv2_mllm", "run", str(recipe), f"output={folder}"]
    command += [f"stages.pretrain.train.strategy={way.strategy}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(folder: Path, way: Way, *words: str) -> str:
    """What the run in `folder` says until it is done; AssertionError if it ends badly."""
    process = started(folder, way, *words)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    return said


def kill(process: subprocess.Popen[str]) -> str:
    """End the run and every process it has started, without a chance to do anything about it.

    torchrun's workers are in sessions of their own: a process group would not reach them.
    """
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    return process.communicate(timeout=60)[0]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of the metrics of the run, without what differs between two runs."""
    path = folder / "pretrain" / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in line.items() if k not in TIMED_FIELDS} for line in whole]


def disturbed(folder: Path, ways: Sequence[Way], kills: int, moments: random.Random) -> list[int]:
    """Finish the run in `folder` in spite of `kills`; the steps at which it was killed."""
    killed_at = []
    kinds = itertools.cycle(ways)
    for number in range(kills):
        process = started(folder, next(kinds))
        # At most this many steps are gained, so that there is something left to kill.
        reached = at_step(folder)
        wait_for(process, folder, reached + moments.randint(1, STEPS // kills))
        if number % 2:
            wait_for_a_save(process, folder)
        else:
            time.sleep(moments.uniform(0, 0.1))
        assert process.poll() is None, f"it ended before it was killed: {process.communicate()[0]}"
        kill(process)
        killed_at.append(at_step(folder))
    finished(folder, next(kinds))
    return killed_at


def at_step(folder: Path) -> int:
    """How far the run is by its newest whole checkpoint."""
    latest = folder / "pretrain" / "checkpoints" / "latest"
    return int(latest.read_text().removeprefix("step-")) if latest.exists() else 0


def wait_for(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Wait until the run, now going on, has a checkpoint at `step` or later."""
    until = time.monotonic() + 600
    while at_step(folder) < step and process.poll() is None:
        assert time.monotonic() < until, f"no step {step}"
        time.sleep(0.005)


def wait_for_a_save(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait until a checkpoint is being written."""
    while process.poll() is None:
        if any(folder.glob("pretrain/checkpoints/step-*.tmp-*")):
            return


def largest_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """Between the numbers of two runs, relative above 1; AssertionError where counts differ."""
    assert len(ours) == len(theirs), (len(ours), len(theirs))
    largest = 0.0
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, int):
                assert line[name] == value, (name, line, other)
            largest = max(largest, abs(line[name] - value) / max(1.0, abs(value)))
    return largest


def main() -> None:
    """Disturb two runs and print how far they end from undisturbed ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    moments = random.Random(args.seed)
    ddp, fsdp2, alone = Way(2, "ddp"), Way(2, "fsdp2"), Way(1, "auto")
    for name, way in (("alone", alone), ("pair", ddp)):
        finished(folder / name, way)
    difference = largest_difference(lines(folder / "pair"), lines(folder / "alone"))
    print(f"2 ranks against 1, undisturbed: largest difference {difference:.1e}", flush=True)
    for name, ways, kills, against, most in (
        ("pair-killed", [ddp], args.kills // 2, "pair", 0.0),
        ("mixed-killed", [ddp, fsdp2, alone], args.kills - args.kills // 2, "alone", 1e-5),
    ):
        steps = disturbed(folder / name, ways, kills, moments)
        difference = largest_difference(lines(folder / name), lines(folder / against))
        print(f"{name}, after kills at steps {steps}: largest difference {difference:.1e}")
        assert difference <= most, (difference, most)


if __name__ == "__main__":
    main()
