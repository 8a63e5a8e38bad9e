"""The loop's promise: stopped anywhere and started again, a run ends as if nothing had happened."""

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from aimv2_mllm.engine import flops, journal, loop, metrics, training, upcoming
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.recipe.train import TrainConfig

STEPS = 10


class Killed(BaseException):
    """As a kill: nothing of ours may run any more after it."""


class Toy(nn.Module):
    """A frozen layer, dropout, and a buffer that training changes: (N, 4) -> (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 6).requires_grad_(False)
        self.body = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.body(self.frozen(x)))))


class Loss(NamedTuple):
    total: Tensor
    error: Tensor
    size: Tensor


class SumOfSquares:
    """Squared error over values plus a size over rows; `on_call` runs before each call."""

    def __init__(self, on_call: Callable[[int, nn.Module], None] | None = None) -> None:
        self.calls = 0
        self.on_call = on_call

    def targets(self, batch: dict[str, Tensor]) -> dict[str, int]:
        return {"rows": len(batch["y"]), "values": batch["y"].numel()}

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], totals: dict[str, int]) -> Loss:
        if self.on_call is not None:
            self.on_call(self.calls, model)
        self.calls += 1
        out = model(batch["x"])
        error = (out.float() - batch["y"]).square().sum() / totals["values"]
        size = out.float().abs().sum() / totals["rows"]
        return Loss(error + 0.1 * size, error, size)


def new_model() -> Toy:
    torch.manual_seed(0)
    return Toy()


def parts_of(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [pair for pair in named if pair[0].startswith("head")]
    return {"body": [pair for pair in named if pair not in head], "head": head}


def settings(**changes: Any) -> TrainConfig:
    values = {"steps": STEPS, "batch_size": 5, "lr": 0.05, "warmup_steps": 3, "final_lr": 0.001}
    values |= {"part_lr": {"head": 0.1}, "weight_decay": 0.1, "log_every": 4, "checkpoint_every": 3}
    return TrainConfig.model_validate({**values, **changes})


def batches(step: int, sizes: tuple[int, ...] = (3, 2)) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(sum(sizes), 4, generator=generator)
    y = torch.randn(sum(sizes), 2, generator=generator)
    pairs = zip(x.split(sizes), y.split(sizes), strict=True)
    return [{"x": a, "y": b, "name": "toy"} for a, b in pairs]


class Result(NamedTuple):
    model: nn.Module
    lines: list[dict[str, Any]]
    summary: dict[str, Any]
    said: list[str]


def run(folder: Path, *, model: nn.Module | None = None, **changes: Any) -> Result:
    """One call of `train` with a fresh model; `changes` replace its arguments or the settings."""
    model = model or new_model()
    said: list[str] = []
    summary = loop.train(
        model,
        changes.pop("parts", None) or parts_of(model),
        changes.pop("objective", None) or SumOfSquares(),
        changes.pop("batches", batches),
        seed=changes.pop("seed", 1),
        fingerprint=changes.pop("fingerprint", "f"),
        config=settings(**changes),
        folder=folder,
        narrate=said.append,
    )
    return Result(model, lines_of(folder), summary, said)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in metrics.TIMED_FIELDS}
        for line in lines
    ]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def assert_same_run(ours: Result, theirs: Result) -> None:
    assert untimed(ours.lines) == untimed(theirs.lines)
    assert_same_weights(weights(ours.model), weights(theirs.model))
    assert untimed([ours.summary["last"]]) == untimed([theirs.summary["last"]])


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    # A kill loses nothing of what was written, only a power cut would.
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The run that nothing interrupts."""
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("killed_at", range(STEPS))
def test_killed_before_any_step_and_started_again_it_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Result, killed_at: int, ahead: bool
) -> None:
    def dying(step: int) -> list[dict[str, Any]]:
        if step == killed_at:
            raise Killed
        return batches(step)

    monkeypatch.setattr(upcoming, "worth_a_thread", lambda device: ahead)
    with pytest.raises(Killed):
        run(tmp_path, batches=dying)
    again = run(tmp_path)
    assert_same_run(again, whole)
    last_saved = killed_at // 3 * 3
    assert again.said == ([f"continuing from step {last_saved}"] if last_saved else [])


@pytest.mark.parametrize("stopped_in", range(STEPS))
def test_interrupted_in_any_step_it_saves_that_step_and_ends_the_same(
    tmp_path: Path, whole: Result, stopped_in: int
) -> None:
    def interrupt(call: int, _: nn.Module) -> None:
        if call == 2 * stopped_in:  # two micro-batches a step
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        loop.train(
            model := new_model(),
            parts_of(model),
            SumOfSquares(interrupt),
            batches,
            config=settings(),
            seed=1,
            folder=tmp_path,
            fingerprint="f",
            narrate=said.append,
        )
    assert signal.getsignal(signal.SIGINT) is before
    done = stopped_in + 1
    assert said == [f"stopped after step {done}; the same command goes on from there"]
    again = run(tmp_path)
    assert again.said == [f"continuing from step {done}"]
    assert_same_run(again, whole)


def test_a_termination_saves_too_and_leaves_with_143(tmp_path: Path, whole: Result) -> None:
    def terminate(call: int, _: nn.Module) -> None:
        if call == 9:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, objective=SumOfSquares(terminate))
    assert stopped.value.code == 143
    assert_same_run(run(tmp_path), whole)


def test_a_second_interrupt_stops_at_once_without_a_checkpoint(tmp_path: Path) -> None:
    def interrupt_twice(call: int, _: nn.Module) -> None:
        if call == 8:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    objective = SumOfSquares(interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, objective=objective)
    assert objective.calls == 8
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000003\n"


def test_outside_the_main_thread_it_trains_without_touching_signals(
    tmp_path: Path, whole: Result
) -> None:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert_same_run(results[0], whole)


def train_slowly(folder: Path) -> None:
    """60 steps of at least 10 ms, in a process of its own; leaves with 130 when interrupted."""

    def slow(step: int) -> list[dict[str, Any]]:
        time.sleep(0.01)
        return batches(step)

    torch.set_num_threads(1)
    os.fsync = lambda handle: None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run(folder, batches=slow, steps=60)
    except KeyboardInterrupt:
        sys.exit(130)


def started(folder: Path) -> BaseProcess:
    """A process in `train_slowly` that has just saved a checkpoint."""
    latest = folder / "checkpoints" / "latest"
    known = latest.read_text() if latest.exists() else ""
    context = multiprocessing.get_context("forkserver")
    # So that only the first of these processes takes seconds to start.
    context.set_forkserver_preload(["torch", "torch._dynamo", "aimv2_mllm.engine.loop"])
    process = context.Process(target=train_slowly, args=(folder,))
    process.start()
    until = time.monotonic() + 300
    while not latest.exists() or latest.read_text() == known:
        assert process.is_alive(), "it ended without a new checkpoint"
        assert time.monotonic() < until, "no new checkpoint"
        time.sleep(0.002)
    return process


def test_killed_for_real_again_and_again_it_ends_the_same(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", steps=60)
    moments = random.Random(7)
    for _ in range(4):
        process = started(tmp_path / "killed")
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
    assert_same_run(run(tmp_path / "killed", steps=60), whole)


def test_interrupted_for_real_it_saves_and_ends_the_same(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", steps=60)
    process = started(tmp_path / "stopped")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(300)
    assert process.exitcode == 130
    again = run(tmp_path / "stopped", steps=60)
    assert again.said[0].startswith("continuing from step ")
    assert_same_run(again, whole)


def test_a_finished_run_started_again_takes_no_step(tmp_path: Path, whole: Result) -> None:
    first = run(tmp_path)
    objective = SumOfSquares()
    again = run(tmp_path, objective=objective)
    assert objective.calls == 0
    assert again.summary == first.summary
    assert_same_run(again, whole)


def test_a_half_written_line_and_lines_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4}\n{"step": 8}\nnot json\n{"step": 12}\n{"step": 5')
    metrics.cut_back(path, 8)
    assert path.read_text() == '{"step": 4}\n{"step": 8}\n'
    metrics.cut_back(tmp_path / "new" / "metrics.jsonl", 0)
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["metrics.jsonl"]


def test_uneven_micro_batches_add_up_to_the_whole_batch(tmp_path: Path) -> None:
    def toy() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    results = []
    for number, sizes in enumerate([(5,), (3, 2), (1, 4), (1, 1, 1, 1, 1)]):
        model = toy()
        parts = {"head": list(model.named_parameters())}
        results.append(
            run(
                tmp_path / str(number),
                model=model,
                parts=parts,
                batches=lambda step, sizes=sizes: batches(step, sizes),
            )
        )
    for result in results[1:]:
        for ours, theirs in zip(untimed(result.lines), untimed(results[0].lines), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        for ours, theirs in zip(
            result.model.parameters(), results[0].model.parameters(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


PER_TOKEN = 2 * (4 * 6 + 2 * 6 * 6 + 3 * 6 * 2)  # operations: frozen, body without input's, head


def packed(step: int) -> list[dict[str, Any]]:
    """Two conversations, of other lengths at every step; what is first is not their lengths."""
    lengths = [2 + step, 3 + step % 3]
    [batch] = batches(step, (sum(lengths),))
    return [{**batch, "lengths": torch.tensor(lengths)}]


def test_conversations_are_counted_by_their_number_and_their_work_by_their_tokens(
    tmp_path: Path,
) -> None:
    def dying(step: int) -> list[dict[str, Any]]:
        if step == 5:
            raise Killed
        return packed(step)

    lines = run(tmp_path / "whole", batches=packed, batch_size=2, log_every=1).lines
    tokens = [int(packed(step)[0]["lengths"].sum()) for step in range(STEPS)]
    assert [line["samples"] for line in lines] == [2 * step for step in range(1, STEPS + 1)]
    assert [line["flops"] for line in lines] == [
        PER_TOKEN * sum(tokens[:step]) for step in range(1, STEPS + 1)
    ]
    with pytest.raises(Killed):
        run(tmp_path / "killed", batches=dying, batch_size=2)
    again = run(tmp_path / "killed", batches=packed, batch_size=2)
    assert again.lines[-1]["flops"] == lines[-1]["flops"]


def test_operations_of_conversations_are_counted_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    class Counter(flops.FlopCounter):
        def __init__(self) -> None:
            counted.append(self)
            super().__init__()

    monkeypatch.setattr(training, "FlopCounter", Counter)
    monkeypatch.setattr(training, "COUNTED_EVERY", 3)
    run(tmp_path, batches=packed, batch_size=2)
    assert len(counted) == -(-STEPS // 3)


def test_what_a_row_costs_is_kept_with_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Result
) -> None:
    def dying(step: int) -> list[dict[str, Any]]:
        if step == 5:
            raise Killed
        return batches(step)

    with pytest.raises(Killed):
        run(tmp_path, batches=dying)
    monkeypatch.setattr(training, "FlopCounter", None)  # compiled, it would count other steps
    assert run(tmp_path).lines[-1]["flops"] == whole.lines[-1]["flops"]


def test_the_memory_told_is_that_of_the_device_that_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 2**30)
    assert "accelerator_gib" not in metrics.peak_memory(torch.device("cpu"))
    assert metrics.peak_memory(torch.device("cuda"))["accelerator_gib"] == 1


def test_the_device_is_measured_before_the_steps_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(journal, "peak", lambda *_: seen.append("measured") or 1e9)
    run(tmp_path, objective=SumOfSquares(lambda call, model: seen.append("step")), steps=4)
    assert seen.index("measured") == 0


def test_each_step_starts_without_the_gradients_of_the_one_before(tmp_path: Path) -> None:
    started: list[bool] = []

    def look(call: int, model: nn.Module) -> None:
        started.append(all(p.grad is None for p in model.parameters()))

    run(tmp_path, objective=SumOfSquares(look))
    assert started == [True, False] * STEPS  # two micro-batches a step


def test_a_line_holds_counts_means_rates_and_what_is_timed(tmp_path: Path) -> None:
    lines = run(tmp_path).lines
    assert [line["step"] for line in lines] == [4, 8, 10]
    every = run(tmp_path / "every", log_every=1).lines
    assert [line["step"] for line in every] == list(range(1, STEPS + 1))
    timed = metrics.TIMED_FIELDS - {"accelerator_gib"}  # only where it trains on one
    means = {"total", "error", "size", "grad_norm"}
    counts = {"step", "samples", "tokens", "targets_rows", "targets_values"}
    for line in lines:
        assert set(line) == means | counts | {"lr_body", "lr_head"} | timed
    last = lines[-1]
    assert {name: last[name] for name in counts} == {
        "step": 10,
        "samples": 50,
        "tokens": 150,
        "targets_rows": 50,
        "targets_values": 100,
    }
    for name in means:
        expected = sum(line[name] for line in every[4:8]) / 4
        assert lines[1][name] == pytest.approx(expected, rel=1e-12)
    assert last["lr_head"] == pytest.approx(2 * last["lr_body"])
    assert all(last[name] > 0 for name in timed)


def test_seconds_go_on_counting_over_a_resume(tmp_path: Path) -> None:
    def slow_start(step: int) -> list[dict[str, Any]]:
        if step == 4:
            raise Killed
        time.sleep(0.1)
        return batches(step)

    with pytest.raises(Killed):
        run(tmp_path, batches=slow_start)
    assert run(tmp_path).summary["seconds"] > 0.3


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_step_is_taken(
    tmp_path: Path, spoil: str
) -> None:
    before: list[dict[str, Tensor]] = []

    class Spoiler(SumOfSquares):
        def __call__(self, *arguments: Any) -> Loss:
            if self.calls == 10:
                before.append({n: p.detach().clone() for n, p in model.named_parameters()})
            loss = super().__call__(*arguments)
            if self.calls != 12:  # the second micro-batch of step 6
                return loss
            # The slope of the root at 0 is infinite.
            ruin = (loss.total * 0).sqrt() if spoil == "gradient" else loss.total * float("inf")
            return loss._replace(total=loss.total + ruin)

    model = new_model()
    with pytest.raises(RunFailed) as failed:
        run(tmp_path, model=model, objective=Spoiler(), log_every=2)
    for words in (
        "step 6: the loss or its gradient is not finite (total ",
        "grad_norm nan" if spoil == "gradient" else "total inf",
        "the last whole checkpoint, step-000003, is kept",
        "try a lower lr (now 0.05)",
    ):
        assert words in str(failed.value)
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4]
    assert_same_weights({n: p.detach() for n, p in model.named_parameters()}, before[0])


def test_only_the_parts_move_and_frozen_weights_are_in_no_checkpoint(whole: Result) -> None:
    start, end = weights(new_model()), weights(whole.model)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved == set(start) - {"frozen.weight", "frozen.bias"}


def test_parts_that_are_not_what_the_model_trains_are_an_error_of_ours(tmp_path: Path) -> None:
    model = new_model()
    with pytest.raises(AssertionError, match=r"in no part.*'head.bias', 'head.weight'"):
        run(tmp_path, model=model, parts={"body": parts_of(model)["body"]}, part_lr={})
    with pytest.raises(AssertionError, match="not the model's parameters"):
        run(tmp_path, model=model, parts=parts_of(new_model()))


def test_the_checkpoint_of_another_run_or_beyond_the_end_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UsageError, match="belongs to another run"):
        run(tmp_path, fingerprint="g")
    with pytest.raises(UsageError, match="at step 10 already, beyond steps = 7"):
        run(tmp_path, steps=7)


def test_after_a_damaged_checkpoint_it_goes_on_from_the_one_before(
    tmp_path: Path, whole: Result
) -> None:
    def dying(step: int) -> list[dict[str, Any]]:
        if step == 8:
            raise Killed
        return batches(step)

    with pytest.raises(Killed):
        run(tmp_path, batches=dying)
    newest = tmp_path / "checkpoints" / "step-000006" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    again = run(tmp_path)
    assert "step-000006 is damaged" in again.said[0]
    assert "going on from step-000003" in again.said[0]
    assert_same_run(again, whole)


def test_a_metrics_file_that_cannot_be_written_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="could not be written: Is a directory"):
        metrics.append_line(tmp_path, {"step": 1})


def test_bf16_runs_the_model_under_autocast_and_fp32_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aimv2_mllm.engine.precision.has_bf16", lambda device: True)
    seen: list[torch.dtype] = []
    for precision in ("bf16", "fp32"):
        model = new_model()
        model.head.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
        run(tmp_path / precision, model=model, precision=precision, steps=4)
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert set(seen[:8]) == {torch.bfloat16}
    assert set(seen[8:]) == {torch.float32}


@pytest.mark.parametrize(("has", "lines"), [(True, 0), (False, 1)])
def test_a_run_is_told_where_bf16_is_not_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: bool, lines: int
) -> None:
    monkeypatch.setattr("aimv2_mllm.engine.loop.has_bf16", lambda device: has)
    said = run(tmp_path, precision="bf16", steps=4).said
    assert len([line for line in said if "so fp32 is computed" in line]) == lines


def test_dropout_depends_on_the_seed_and_the_step_alone(tmp_path: Path) -> None:
    def draws(seed: int, before: int) -> list[float]:
        seen: list[float] = []
        torch.manual_seed(before)
        objective = SumOfSquares(lambda call, model: seen.append(torch.rand(()).item()))
        run(tmp_path / f"{seed}-{before}", objective=objective, seed=seed)
        return seen

    first = draws(1, 5)
    assert draws(1, 6) == first
    assert len(set(first)) == len(first)
    assert not set(draws(2, 5)) & set(first)


def test_the_next_batch_is_made_while_the_present_one_is_used() -> None:
    made = [threading.Event() for _ in range(3)]

    def making(step: int) -> list[dict[str, Any]]:
        made[step].set()
        return [{"step": step}]

    steps: Iterator[Any] = upcoming.prepared(making, 0, 3, ahead=True)
    assert next(steps) == (0, [{"step": 0}])
    assert made[1].wait(10)
    assert not made[2].is_set()
    assert list(steps) == [(1, [{"step": 1}]), (2, [{"step": 2}])]


@pytest.mark.parametrize("ahead", [True, False])
def test_an_error_in_a_batch_is_raised_at_its_step(ahead: bool) -> None:
    def failing(step: int) -> list[dict[str, Any]]:
        return [{"value": 1 // (2 - step)}]

    seen: list[int] = []
    with pytest.raises(ZeroDivisionError):
        seen.extend(step for step, _ in upcoming.prepared(failing, 0, 4, ahead=ahead))
    steps = upcoming.prepared(failing, 0, 4, ahead=ahead)
    assert [next(steps)[0], next(steps)[0]] == [0, 1]


def test_without_a_terminal_the_first_and_last_step_are_told_in_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == ["step 1/10", "step 10/10"]
    assert all(word in told[0] for word in ("loss ", "lr ", "samples/s", " left"))
