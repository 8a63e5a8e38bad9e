"""Tasks of a comparison, each in processes of its own, some beside each other.

Owns who has which part of the machine, and what became of tasks that failed: the others go on.
Every command can be repeated by hand from a task's `log.txt`.
"""

import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from aimv2_mllm.comparison.tasks import DONE, Task, undone
from aimv2_mllm.disk import replace_file
from aimv2_mllm.errors import RunFailed
from aimv2_mllm.folders import RECIPE_FILE
from aimv2_mllm.narration import PROGRAM, Narrate
from aimv2_mllm.recipe.schema import dump_recipe

LOG = "log.txt"
# Looked up before any child is made: between fork and exec nothing may be.
_set_of_process = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


@dataclass
class _Running:
    task: Task
    slot: int
    log: IO[bytes]
    begun: float
    number: int = 0  # of the command
    process: "subprocess.Popen[bytes] | None" = None


def do_all(tasks: Sequence[Task], jobs: int, narrate: Narrate) -> dict[Path, str]:
    """Do every task that is not done, `jobs` at a time; of those that failed, their folder and why.

    A task whose forerunner failed fails too. Interrupted, it ends what runs, which saves itself,
    and the same call goes on from there.
    """
    failed: dict[Path, str] = {}
    waiting = undone(tasks)
    missing = {task.folder for task in waiting}
    running: list[_Running] = []
    bar = tqdm(total=len(tasks), initial=len(tasks) - len(waiting), unit="run", disable=None)

    def tell(text: str) -> None:
        bar.clear()
        narrate(text)
        bar.refresh()

    with _ended(running, tell), bar:
        while waiting or running:
            for task in [t for t in waiting if any(folder in failed for folder in t.after)]:
                waiting.remove(task)
                failed[task.folder] = next(failed[f] for f in task.after if f in failed)
                bar.update()
            ready = (t for t in waiting if missing.isdisjoint(t.after))
            while len(running) < jobs and (following := next(ready, None)) is not None:
                waiting.remove(following)
                running.append(_begin(following, _free_slot(running), jobs))
            for one in [r for r in running if _has_ended(r, jobs)]:
                running.remove(one)
                missing.discard(one.task.folder)
                bar.update()
                seconds = f"{time.monotonic() - one.begun:.0f} s"
                if why := _close(one):
                    failed[one.task.folder] = why
                    tell(f"{one.task.name}: FAILED after {seconds}: {why}")
                else:
                    tell(f"{one.task.name}: done in {seconds}")
            time.sleep(0.1)
    return failed


@contextmanager
def _ended(running: list[_Running], tell: Narrate) -> Iterator[None]:
    """On the way out, also by a signal that ends us, end the processes of those that still run."""
    ending = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(kind, lambda number, _: sys.exit(128 + number)) for kind in ending]
    try:
        yield
    finally:
        for kind, handler in zip(ending, before, strict=True):
            signal.signal(kind, handler)
        if running:
            tell(f"{len(running)} runs are told to save themselves and end")
        processes = [one.process for one in running if one.process is not None]
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        for one in running:
            one.log.close()


def _free_slot(running: Sequence[_Running]) -> int:
    taken = {one.slot for one in running}
    return next(slot for slot in range(len(running) + 1) if slot not in taken)


def _begin(task: Task, slot: int, jobs: int) -> _Running:
    try:
        task.folder.mkdir(parents=True, exist_ok=True)
        for path in task.makes if task.anew else ():
            shutil.rmtree(path, ignore_errors=True)
        if task.recipe is not None:
            replace_file(task.folder / RECIPE_FILE, dump_recipe(task.recipe).encode())
        log = (task.folder / LOG).open("ab")
    except OSError as error:
        raise RunFailed(f"{task.folder}: cannot be written ({error.strerror})") from None
    one = _Running(task, slot, log, time.monotonic())
    _start(one, jobs)
    return one


def _start(one: _Running, jobs: int) -> None:
    command = one.task.commands[one.number]
    one.log.write(f"$ {shlex.join(command)}\n".encode())
    one.log.flush()
    one.process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=one.log,
        stderr=subprocess.STDOUT,
        process_group=0,  # Ctrl-C is for us, who then end them
        preexec_fn=_end_with_parent,
        env=os.environ | _share(one.slot, jobs),
    )


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM, at which a run saves itself, when who started it is killed."""
    if _set_of_process is not None:
        _set_of_process(1, signal.SIGTERM)  # PR_SET_PDEATHSIG of prctl(2)


def _share(slot: int, jobs: int) -> Mapping[str, str]:
    """The part of the machine for one of several processes: its threads and its GPUs, which
    several share where there are fewer."""
    if jobs == 1:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = {"OMP_NUM_THREADS": str(max(1, (cores or 1) // jobs))}
    devices = list(_devices())
    if not devices:
        return share
    own = max(1, len(devices) // jobs)
    first = slot * own % len(devices)
    return share | {"CUDA_VISIBLE_DEVICES": ",".join(devices[first : first + own])}


def _devices() -> Iterator[str]:
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    yield from given.split(",") if given else map(str, range(torch.cuda.device_count()))


def _has_ended(one: _Running, jobs: int) -> bool:
    """Whether the last command, or one that failed, has ended; else the next one is started."""
    assert one.process is not None
    code = one.process.poll()
    if code is None:
        return False
    if code == 0 and one.number + 1 < len(one.task.commands):
        one.number += 1
        _start(one, jobs)
        return False
    return True


def _close(one: _Running) -> str:
    """Note that a task ended well; otherwise why it failed, in its own last words."""
    assert one.process is not None
    one.log.close()
    if one.process.returncode == 0:
        replace_file(
            one.task.folder / DONE, json.dumps({"digest": one.task.digest}).encode() + b"\n"
        )
        return ""
    whole = (one.task.folder / LOG).read_text(encoding="utf-8", errors="replace")
    lines = [line for line in whole.rpartition("\n$ ")[2].splitlines()[1:] if line.strip()]
    said = [line for line in lines if line.startswith(f"{PROGRAM}: ")] or lines
    last = said[-1].removeprefix(f"{PROGRAM}: ") if said else ""
    if one.process.returncode < 0:
        last = f"ended by {signal.Signals(-one.process.returncode).name}"
        last += ", as where memory is short" * (one.process.returncode == -signal.SIGKILL)
    return f"{last or f'exit code {one.process.returncode}'} (see {one.task.folder / LOG})"
