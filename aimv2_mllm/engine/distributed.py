"""The processes that train together: how they find each other, what they agree on, how they end.

Owns the start from the environment that `torchrun` and `accelerate launch` set, and every word
between ranks that is no gradient. A rank that is lost ends the others within a bounded time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from aimv2_mllm.errors import RunFailed, UsageError

Value = TypeVar("Value")

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Seconds after which a rank that does not answer counts as lost.
TIMEOUT, DEFAULT_TIMEOUT = "AIMV2_RANK_TIMEOUT", 600
# What rank 0 does alone, such as writing a result, takes as long as it takes.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; by default it is the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on this machine
    patient: Any = None  # the group that waits for what rank 0 does alone

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that narrates and writes."""
        return self.rank == 0

    def add_up(self, counts: Sequence[int]) -> list[int]:
        """The sums over all ranks of as many counts, in their order."""
        if self.size == 1:
            return list(counts)
        sums = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(sums)
        return [int(count) for count in sums]

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        if self.size == 1:
            return number
        most = torch.tensor(number)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks by rank, however long the slowest one takes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        # Pickled, but by our own processes and never to a file.
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def first(self, task: Callable[[], Value]) -> Value:
        """What `task` returns on rank 0, which alone runs it while the others wait.

        When it raises `UsageError` or `RunFailed` there, the others leave without a word.
        """
        if self.size == 1:
            return task()
        outcome: list[Any] = [None, 0]
        failure = None
        if self.is_first:
            try:
                outcome[0] = task()
            except (UsageError, RunFailed) as error:
                failure, outcome[1] = error, exit_code(error)
        dist.broadcast_object_list(outcome, src=0, group=self.patient)
        value, code = outcome
        if code:
            raise failure or SystemExit(code)
        return value  # type: ignore[no-any-return]

    def device(self, wanted: str) -> torch.device:
        """This rank's device for `wanted`: auto, cpu or cuda. Raises `UsageError` without it."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if wanted == "cpu" or (wanted == "auto" and count == 0):
            return torch.device("cpu")
        if count == 0:
            raise UsageError(f"train.device is {wanted}, and torch finds no CUDA device: give cpu")
        if self.local_rank >= count:
            raise UsageError(
                f"train.device is {wanted}, and this machine has {count} CUDA devices for its"
                f" processes 0 to {self.local_rank} or more: start at most {count} on it"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among the others that a launcher started, until all of them are done.

    A message that several ranks would end with is said by one; the others leave with its exit code.
    Raises `RunFailed` when another rank is lost, `UsageError` when the environment makes no sense.
    """
    ranks, timeout = _from_environment()
    if ranks.size == 1:
        yield ranks
        return
    store, ranks = _connected(ranks, timedelta(seconds=timeout))
    try:
        yield ranks
        ranks.gather(None)
    except (UsageError, RunFailed) as error:
        _leave(error, ranks, store)
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        _leave(_loss(ranks, timeout), ranks, store)
    # Not after an error: it may wait for those that are lost.
    dist.destroy_process_group()


def _from_environment() -> tuple[Ranks, float]:
    present = [name for name in LAUNCHER if name in os.environ]
    if int_of("WORLD_SIZE", 1) == 1:
        return ALONE, DEFAULT_TIMEOUT
    if len(present) < len(LAUNCHER):
        missing = ", ".join(name for name in LAUNCHER if name not in present)
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and {missing} is not set: start with"
            " torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    ranks = Ranks(int_of("RANK", 0), int_of("WORLD_SIZE", 1), int_of("LOCAL_RANK", 0))
    return ranks, int_of(TIMEOUT, DEFAULT_TIMEOUT)


def exit_code(error: UsageError | RunFailed) -> int:
    """The exit code that `main` makes of `error`."""
    return 2 if isinstance(error, UsageError) else 1


def int_of(name: str, default: int) -> int:
    """The whole number in the environment's variable `name`; `UsageError` for anything else."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r} in the environment, must be a whole number")
    return int(text)


def _connected(ranks: Ranks, timeout: timedelta) -> tuple[Any, Ranks]:
    # Words between processes go by gloo even where gradients go by NCCL: the accelerator need not
    # wait for them.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", ranks.rank, ranks.size, timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (dist.DistError, ValueError) as error:
        raise RunFailed(
            f"rank {ranks.rank} of {ranks.size} could not join the others at"
            f" {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({error})"
        ) from None
    return store, Ranks(rank, size, ranks.local_rank, patient)


def _is_loss(error: RuntimeError) -> bool:
    # gloo has no error of its own: its messages name the source file.
    words = ("/gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _loss(ranks: Ranks, timeout: float) -> RunFailed:
    return RunFailed(
        f"another of the {ranks.size} ranks ended, or did not answer for {timeout:.0f} s"
        f" ({TIMEOUT}); every whole checkpoint is kept: the same command goes on from the newest"
    )


def _leave(error: UsageError | RunFailed, ranks: Ranks, store: Any) -> None:
    """Raise `error`, or leave without a word when another rank has said the same."""
    key = f"said/{hashlib.sha256(str(error).encode()).hexdigest()}"
    try:
        is_new = store.add(key, 1) == 1
    except RuntimeError:  # the store went down with its process
        is_new = True
    if not is_new:
        raise SystemExit(exit_code(error)) from None
    raise error if ranks.is_first else type(error)(f"rank {ranks.rank}: {error}") from None
