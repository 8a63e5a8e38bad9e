"""The batches of the steps to come, made by other processes: as many steps ahead as there are
workers, twice, and handed over in order.

What a worker says is wrong comes out in the trainer as it would without workers.
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.process
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aimv2_mllm.errors import RunFailed, UsageError, first_line

STEPS_AHEAD = 2  # per worker
GRACE = 2.0  # seconds that a worker has to end by itself
MicroBatches = Sequence[Mapping[str, Any]]


class _Refusal(NamedTuple):
    kind: type[Exception]
    text: str


class _Joined(NamedTuple):
    """Tensors of different shapes, one after the other."""

    values: Tensor
    shapes: list[tuple[int, ...]]


class _Steps(Dataset[MicroBatches | _Refusal]):
    """A step's batches by the step's number, or what was refused while making them."""

    def __init__(self, batches: Callable[[int], MicroBatches]) -> None:
        self._batches = batches

    def __getitem__(self, step: int) -> MicroBatches | _Refusal:
        try:
            return [{k: _joined(v) for k, v in batch.items()} for batch in self._batches(step)]
        except (UsageError, RunFailed) as error:
            # As a value: raised, it would come out wrapped in the worker's traceback.
            return _Refusal(type(error), str(error))


def _joined(value: Any) -> Any:
    # Each tensor on its way to the trainer takes an open file, of which there may be 1,024.
    if not (isinstance(value, list) and value and isinstance(value[0], Tensor)):
        return value
    return _Joined(torch.cat([one.flatten() for one in value]), [tuple(v.shape) for v in value])


def _split(value: Any) -> Any:
    if not isinstance(value, _Joined):
        return value
    parts = torch.split(value.values, [math.prod(shape) for shape in value.shapes])
    return [part.view(*shape) for part, shape in zip(parts, value.shapes, strict=True)]


def _ignore_signals(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the trainer still needs the
    # batches of the step it is in, and ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _as_it_is(batches: Any) -> Any:
    return batches


def prepared_by_workers(
    batches: Callable[[int], MicroBatches], first: int, steps: int, *, workers: int, pin: bool
) -> Generator[tuple[int, MicroBatches], None, None]:
    """Steps `first`..`steps` - 1 with their micro-batches, made by `workers` processes.

    `pin` puts tensors where an accelerator fetches them from. Closing the generator ends the
    workers. Raises what `batches` raises, and RunFailed when a worker dies.
    """
    loader = DataLoader(
        _Steps(batches),
        batch_size=None,
        sampler=range(first, steps),
        num_workers=workers,
        prefetch_factor=STEPS_AHEAD,
        collate_fn=_as_it_is,
        pin_memory=pin,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # it draws from one, which must not be the trainer's
    )
    before = set(multiprocessing.active_children())
    made = iter(loader)
    started = set(multiprocessing.active_children()) - before
    try:
        for step in range(first, steps):
            death = None
            try:
                micro_batches = next(made)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error) or "Caught" in str(error):
                    raise
                death = first_line(error)
            if death is not None:
                # Not while that error is known, which would keep the other workers.
                raise RunFailed(
                    f"step {step + 1}: a process that prepares samples died ({death}); most often"
                    " memory ran out: run the same command with fewer data.workers"
                )
            if isinstance(micro_batches, _Refusal):
                raise micro_batches.kind(micro_batches.text)
            yield step, [{k: _split(v) for k, v in batch.items()} for batch in micro_batches]
    finally:
        del made  # ends the workers
        _end(started)


def _end(workers: Iterable[multiprocessing.process.BaseProcess]) -> None:
    """Kill what is left of `workers`: as they ignore signals, Python would wait for them at its
    end."""
    for worker in workers:
        worker.join(GRACE)
    left = [worker for worker in workers if worker.is_alive()]
    if not left:
        return
    # The loader has a handler that makes an error of each death.
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if is_main else None
    for worker in left:
        worker.kill()
        worker.join()
    if is_main:
        signal.signal(signal.SIGCHLD, handler)
