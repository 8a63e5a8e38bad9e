"""Steps prepared by other processes: the same batches in order, and one word for what is wrong."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import write_shard
from test_corpus import assert_same, batches_of, data_of, shards_of

from aimv2_mllm.engine import workers as module
from aimv2_mllm.engine.skipping import FEWEST_ROWS, Skipping
from aimv2_mllm.engine.workers import prepared_by_workers
from aimv2_mllm.errors import RunFailed, UsageError


def prepared(
    batches: Any, steps: range, workers: int = 2
) -> list[tuple[int, Sequence[dict[str, Any]]]]:
    return list(prepared_by_workers(batches, steps.start, steps.stop, workers=workers, pin=False))


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def numbered(step: int) -> list[dict[str, Any]]:
    return [{"step": torch.tensor(step), "process": os.getpid(), "skipped": {"empty": step}}]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_steps_come_in_order_from_other_processes_which_end(workers: int) -> None:
    before = children()
    made = prepared(numbered, range(3, 10), workers)
    assert [(step, int(batch[0]["step"])) for step, batch in made] == [(s, s) for s in range(3, 10)]
    processes = {batch[0]["process"] for _, batch in made}
    assert len(processes) == workers
    assert os.getpid() not in processes
    assert children() == before
    assert type(made[1][1][0]["skipped"]["empty"]) is int


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_samples_that_the_trainer_itself_would_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    write_shard(tmp_path / "a.tar", range(9), size=40)
    batches = batches_of(data_of(shards_of(tmp_path / "a.tar"), {"kind": "handwriting"}), micro=4)
    loader = module.DataLoader
    monkeypatch.setattr(
        module, "DataLoader", lambda *a, **k: loader(*a, multiprocessing_context=method, **k)
    )
    steps = range(2, 5)
    for step, made in prepared(batches, steps, workers=1):
        assert_same(made, batches(step))


def test_the_trainers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prepared(numbered, range(3))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", [UsageError, RunFailed])
def test_what_is_refused_in_a_worker_comes_out_as_it_was_said(kind: type[Exception]) -> None:
    def refusing(step: int) -> list[dict[str, Any]]:
        if step == 4:
            raise kind("the shard is gone")
        return numbered(step)

    before = children()
    upcoming = prepared_by_workers(refusing, 0, 9, workers=2, pin=False)
    assert [next(upcoming)[0] for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(kind) as error:
        next(upcoming)
    assert str(error.value) == "the shard is gone"
    assert children() == before


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    def mistaken(step: int) -> list[dict[str, Any]]:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match=r"(?s)Caught RuntimeError.*in mistaken.*a bug"):
        prepared(mistaken, range(3))


def test_a_worker_that_dies_ends_the_run_in_words() -> None:
    def dying(step: int) -> list[dict[str, Any]]:
        if step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return numbered(step)

    before = children()
    with pytest.raises(RunFailed, match=r"step 2: a process .* died .*fewer data\.workers"):
        prepared(dying, range(4), workers=2)
    assert children() == before  # Python would wait for them at its end


def test_an_error_of_the_program_leaves_no_worker_behind() -> None:
    def broken(step: int) -> list[dict[str, Any]]:
        raise RuntimeError("a defect")

    before = children()
    with pytest.raises(RuntimeError, match="a defect"):
        prepared(broken, range(4), workers=2)
    assert children() == before


def test_a_signal_to_the_whole_group_leaves_the_workers_at_work() -> None:
    upcoming = prepared_by_workers(numbered, 0, 8, workers=1, pin=False)
    _, [batch] = next(upcoming)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(batch["process"], number)
    time.sleep(0.1)
    assert [step for step, _ in upcoming] == list(range(1, 8))


def test_closing_early_ends_the_workers() -> None:
    before = children()
    upcoming = prepared_by_workers(numbered, 0, 1000, workers=2, pin=False)
    next(upcoming)
    assert len(children() - before) == 2
    upcoming.close()
    assert children() == before


def test_too_large_a_share_of_unusable_rows_ends_the_run_with_counts_and_names() -> None:
    skipping = Skipping(0.05)
    names = [f"a.tar, row {i}: is empty (empty)" for i in range(4)]
    assert skipping.take_names([{"skipped_rows": names, "skipped": {"empty": 4}}]) == [
        {"skipped": {"empty": 4}}
    ]
    skipping.take_names([{}, {"skipped_rows": ["b.tar, row 9 (empty)"] * 5}])
    skipping.check(FEWEST_ROWS - 60, {"empty": 59})  # too few rows to judge
    skipping.check(950, {"empty": 50})  # just the share
    with pytest.raises(RunFailed) as error:
        skipping.check(949, {"undecodable": 11, "empty": 40})
    said = str(error.value)
    assert said.startswith("51 of 1,000 rows could not be used (40 empty, 11 undecodable)")
    assert "5.0% that data.max_skipped allows" in said
    assert said.count("a.tar, row") == 4
    assert said.count("b.tar, row") == 1
