"""Ranks: what several processes train together is what one trains, however they end and go on."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import TCPStore

from aimv2_mllm.engine import checkpoint, metrics
from aimv2_mllm.engine.distributed import Ranks, joined
from aimv2_mllm.engine.loop import train
from aimv2_mllm.engine.pieces import Stored
from aimv2_mllm.engine.strategies import give_back, place, whole
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.recipe.train import TrainConfig

ROWS = 8  # of a step's batch


class Stack(nn.Module):
    """Blocks, a vector, a frozen layer, a buffer that no file has, and a bias of fewer rows than
    ranks: (N, 4) to (N, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 6).requires_grad_(False)
        self.start = nn.Parameter(torch.randn(6))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)) for _ in range(3)
        )
        self.head = nn.Linear(6, 1)
        self.register_buffer("scale", torch.rand(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(x)
        x = x * self.scale.to(x.dtype) + self.start
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Loss(NamedTuple):
    total: Tensor
    error: Tensor


class Squares:
    """Squared error over all values of the step."""

    def targets(self, batch: dict[str, Tensor]) -> dict[str, int]:
        return {"values": batch["y"].numel()}

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], totals: dict[str, int]) -> Loss:
        error = (model(batch["x"]).float() - batch["y"]).square().sum() / totals["values"]
        return Loss(10 * error, error)  # so that clipping has something to do


def new_model() -> Stack:
    torch.manual_seed(0)
    return Stack()


def settings(**changes: Any) -> TrainConfig:
    values = {"steps": 9, "batch_size": ROWS, "micro_batch_size": 2, "lr": 0.01, "clip": 0.5}
    values |= {"log_every": 1, "checkpoint_every": 3, "weight_decay": 0.1, "device": "cpu"}
    return TrainConfig.model_validate({**values, **changes})


def share(
    ranks: Ranks, size: int, at_step: dict[int, Callable[[], None]]
) -> Callable[[int], list[dict[str, Any]]]:
    """The micro-batches of this rank; row 1 of each step is left out, so that ranks are uneven.

    `at_step` is called when the batches of that step are made, which may be a step ahead.
    """

    def at(step: int) -> list[dict[str, Any]]:
        at_step.get(step, lambda: None)()
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(ROWS, n, generator=generator) for n in (4, 1))
        count = ROWS // ranks.size
        first = ranks.rank * count
        made: list[dict[str, Any]] = []
        for low in range(first, first + count, min(size, count)):
            high = low + min(size, count)
            rows = [row for row in range(low, high) if row != 1]
            batch: dict[str, Any] = {"x": x[rows], "y": y[rows]}
            made.append(batch | ({"skipped": {"empty": 1}} if low <= 1 < high else {}))
        return made

    return at


def training(folder: Path, ranks: Ranks, **changes: Any) -> None:
    """Train a new model in `folder`; `signals` says which is raised at which (rank, step)."""
    signals = changes.pop("signals", {})
    fingerprint = changes.pop("fingerprint", "f")
    at_step = {
        step: lambda number=number: signal.raise_signal(number)
        for (rank, step), number in signals.items()
        if rank == ranks.rank
    }
    model, config = new_model(), settings(**changes)
    parts = {"all": [(n, p) for n, p in model.named_parameters() if p.requires_grad]}
    train(
        model,
        parts,
        Squares(),
        share(ranks, config.micro_batch_size or ROWS, at_step),
        config=config,
        seed=1,
        folder=folder,
        fingerprint=fingerprint,
        narrate=lambda text: say(folder, 0, text) if ranks.is_first else None,
        ranks=ranks,
    )
    if ranks.is_first:
        torch.save(model.state_dict(), folder / "weights.pt")


def training_in_bf16(folder: Path, ranks: Ranks, **changes: Any) -> None:
    """As `training`, on a processor that is told that it has products of bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aimv2_mllm.engine.strategies.has_bf16", lambda device: True)
        training(folder, ranks, **changes)


def say(folder: Path, rank: int, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"said-{rank}").open("a") as file:
        file.write(f"{text}\n")


def said(folder: Path, rank: int) -> str:
    path = folder / f"said-{rank}"
    return path.read_text() if path.exists() else ""


def member(
    rank: int, size: int, port: int, folder: Path, task: Callable[..., None], words: Any
) -> None:
    """One rank, in a process of its own; what `main` would say goes to its file."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, size, "127.0.0.1", port)), strict=True))
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with joined() as ranks:
            task(folder, ranks, **words)
    except (UsageError, RunFailed) as error:
        say(folder, rank, str(error))
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


class Launched(NamedTuple):
    """Ranks at work, and where they meet."""

    processes: list[BaseProcess]
    store: TCPStore


def started(size: int, folder: Path, task: Callable[..., None], **words: Any) -> Launched:
    """As many ranks at `task`."""
    # Held by the launcher, as torchrun does.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    # So that only the first of these processes takes seconds to start.
    context.set_forkserver_preload(["torch", "torch._dynamo", "aimv2_mllm.engine.loop"])
    processes = [
        context.Process(target=member, args=(rank, size, store.port, folder, task, words))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return Launched(processes, store)


def ended(launched: Launched) -> list[int | None]:
    """The exit codes, within a bounded time."""
    processes = launched.processes
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def result(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    untimed = [{k: v for k, v in line.items() if k not in metrics.TIMED_FIELDS} for line in lines]
    return untimed, torch.load(folder / "weights.pt", weights_only=True)


def assert_close(ours: Path, theirs: Path) -> None:
    lines, weights = result(ours)
    other_lines, other_weights = result(theirs)
    assert len(lines) == len(other_lines)
    for line, other in zip(lines, other_lines, strict=True):
        counts = {k for k, v in other.items() if isinstance(v, int)}
        assert {k: line[k] for k in counts} == {k: other[k] for k in counts}
        assert line == pytest.approx(other, abs=1e-5, rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, other_weights[name], rtol=1e-5, atol=1e-5)


def assert_equal(ours: Path, theirs: Path) -> None:
    lines, weights = result(ours)
    other_lines, other_weights = result(theirs)
    assert lines == other_lines
    assert not [name for name in weights if not torch.equal(weights[name], other_weights[name])]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    training(folder, Ranks())
    return folder


VARIANTS: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2"},
    "ddp in one micro-batch": {"strategy": "ddp", "micro_batch_size": None},
    "ddp, activations twice": {"strategy": "ddp", "activation_checkpointing": True},
    "fsdp2, activations twice": {"strategy": "fsdp2", "activation_checkpointing": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_train_as_one_does(tmp_path: Path, alone: Path, variant: str) -> None:
    assert ended(started(2, tmp_path, training, **VARIANTS[variant])) == [0, 0]
    assert_close(tmp_path, alone)
    lines, _ = result(tmp_path)
    assert lines[-1]["targets_values"] == 9 * (ROWS - 1)
    assert lines[-1]["skipped_empty"] == 9


def test_bf16_keeps_weights_of_fp32_also_where_they_are_sharded(
    tmp_path: Path, alone: Path
) -> None:
    words = {"strategy": "fsdp2", "precision": "bf16", "steps": 2}
    assert ended(started(2, tmp_path, training_in_bf16, **words)) == [0, 0]
    first, expected = result(tmp_path)[0][0]["total"], result(alone)[0][0]["total"]
    assert first != expected
    assert first == pytest.approx(expected, rel=0.02)
    (path,) = (tmp_path / "checkpoints").glob("step-*")
    stored = Stored(sorted(path.glob("*.safetensors")))
    assert {stored.kind(name)[1] for name in stored} == {torch.float32}


def placing(folder: Path, ranks: Ranks, tied: bool, once: bool) -> None:
    """Shard a model, of which with `once` the first rank alone has numbers, and give it back; every
    rank says how many bytes its model keeps then."""

    def says_bytes() -> None:
        sizes = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}
        say(folder, ranks.rank, str(sum(storage.nbytes() for storage in sizes.values())))

    model = new_model()
    expected = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    if once and not ranks.is_first:
        model = model.to("meta")
    if tied:
        model.frozen.bias = model.start
        expected["frozen.bias"] = expected["start"]
    own = dict(model.named_parameters())
    placed = place(model, settings(strategy="fsdp2"), ranks)
    says_bytes()
    there = dict(placed.module.named_parameters())
    if tied:
        assert placed.module.frozen.bias is placed.module.start
    for name, tensor in [*there.items(), *placed.module.named_buffers()]:
        assert torch.equal(whole(tensor.detach()), expected[name]), name
        assert tensor.requires_grad == (name in own and own[name].requires_grad), name
    assert {name: p.shape for name, p in own.items()} == {
        name: expected[name].shape for name in own
    }
    give_back(placed, model, ranks)
    says_bytes()
    assert all(own[name] is p for name, p in model.named_parameters())
    if ranks.is_first:
        same = {name: torch.equal(t, expected[name]) for name, t in model.state_dict().items()}
        assert all(same.values()), same


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_model_is_whole_on_no_rank_and_given_back_to_the_first(
    tmp_path: Path, tied: bool, once: bool
) -> None:
    assert ended(started(2, tmp_path, placing, tied=tied, once=once)) == [0, 0]
    counts = [[int(line) for line in said(tmp_path, rank).splitlines()] for rank in (0, 1)]
    whole = sum(p.nbytes for p in new_model().parameters()) - tied * new_model().start.nbytes
    number = len([*new_model().parameters()]) - tied
    assert counts == [[4 * number, whole], [4 * number, 4 * number]]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_lost_rank_ends_the_other_and_both_go_on_to_the_bit(
    tmp_path: Path, strategy: str
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert ended(started(2, whole, training, strategy=strategy)) == [0, 0]
    start = time.monotonic()
    dying = {(1, 5): signal.SIGKILL}
    assert ended(started(2, killed, training, strategy=strategy, signals=dying)) == [1, -9]
    assert time.monotonic() - start < 60
    assert said(killed, 0).count("another of the 2 ranks ended") == 1
    assert (killed / "checkpoints" / "latest").read_text() == "step-000003\n"
    assert ended(started(2, killed, training, strategy=strategy)) == [0, 0]
    assert "continuing from step 3" in said(killed, 0)
    assert said(killed, 1) == ""
    assert_equal(killed, whole)


def test_a_run_goes_on_under_other_strategies_and_numbers_of_ranks(
    tmp_path: Path, alone: Path
) -> None:
    for size, strategy, rank, step in ((2, "fsdp2", 1, 4), (1, "auto", 0, 7)):
        dying = {(rank, step): signal.SIGKILL}
        codes = ended(started(size, tmp_path, training, strategy=strategy, signals=dying))
        assert codes[rank] == -9
    assert ended(started(2, tmp_path, training, strategy="ddp")) == [0, 0]
    assert said(tmp_path, 0).count("continuing from step 3") == 1
    assert said(tmp_path, 0).count("continuing from step 6") == 1
    assert_close(tmp_path, alone)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_one_rank_makes_all_save_and_leave(
    tmp_path: Path, alone: Path, number: int, code: int
) -> None:
    asked = {(1, 5): number}
    assert ended(started(2, tmp_path, training, strategy="fsdp2", signals=asked)) == [code, code]
    (line,) = said(tmp_path, 0).splitlines()
    step = int(line.removeprefix("stopped after step ").split(";")[0])
    assert step in (5, 6)
    latest = (tmp_path / "checkpoints" / "latest").read_text().strip()
    assert latest == checkpoint.step_name(step)
    assert ended(started(2, tmp_path, training, strategy="ddp")) == [0, 0]
    assert_close(tmp_path, alone)


def test_all_ranks_go_back_behind_a_damaged_checkpoint(tmp_path: Path, alone: Path) -> None:
    dying = {(0, 8): signal.SIGKILL}
    assert ended(started(2, tmp_path, training, strategy="fsdp2", signals=dying))[0] == -9
    newest = tmp_path / "checkpoints" / "step-000006" / "tensors-1-of-2.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert ended(started(2, tmp_path, training, strategy="fsdp2")) == [0, 0]
    assert "step-000006 is damaged (tensors-1-of-2.safetensors has" in said(tmp_path, 0)
    assert "continuing from step 3" in said(tmp_path, 0)
    assert_close(tmp_path, alone)


def test_what_every_rank_finds_is_said_once(tmp_path: Path) -> None:
    assert ended(started(2, tmp_path, training, steps=3)) == [0, 0]
    assert ended(started(2, tmp_path, training, fingerprint="g")) == [2, 2]
    words = said(tmp_path, 0) + said(tmp_path, 1)
    assert words.count("belongs to another run") == 1


def failing(folder: Path, ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise UsageError("no such shard")
    ranks.add_up([1])


def test_what_one_rank_finds_is_said_with_its_number(tmp_path: Path) -> None:
    assert ended(started(2, tmp_path, failing)) == [1, 2]
    assert said(tmp_path, 1) == "rank 1: no such shard\n"
    assert "another of the 2 ranks ended" in said(tmp_path, 0)


def filling(folder: Path, ranks: Ranks) -> None:
    """Train with so little room that no checkpoint fits on the disk of rank 1."""
    if ranks.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    training(folder, ranks, strategy="fsdp2")


def test_a_disk_that_refuses_one_rank_ends_all_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert ended(started(2, tmp_path, filling)) == [1, 1]
    words = said(tmp_path, 0) + said(tmp_path, 1)
    assert words.count("checkpoint step-000003 (0.0 MiB) could not be written") == 1
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_launch_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="WORLD_SIZE is 2 and RANK, "), joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="WORLD_SIZE is 'two'"), joined():
        pass


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match=r"train.device is cuda.*no CUDA device"):
        Ranks().device("cuda")
    assert Ranks().device("auto").type == "cpu"
