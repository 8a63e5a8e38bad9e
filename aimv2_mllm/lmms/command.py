"""What the verb `lmms-eval` does: our answers judged by lmms-eval, a process for each benchmark.

Owns its words on the terminal and the folder of results. A benchmark that is done is not run again,
one that fails is told and the others go on.
"""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from aimv2_mllm.disk import replace_file
from aimv2_mllm.errors import RunFailed, UsageError, nearest
from aimv2_mllm.evaluation.answerers import digest, found
from aimv2_mllm.evaluation.asking import demand_same
from aimv2_mllm.files import sha256
from aimv2_mllm.lmms.benchmarks import (
    Benchmark,
    Benchmarks,
    Number,
    benchmarks_of,
    numbers_of,
    table,
)
from aimv2_mllm.lmms.environment import Inventory, demand_environment, inventory, python_of
from aimv2_mllm.lmms.plugin import MODEL
from aimv2_mllm.model.hub import pinned
from aimv2_mllm.model.shards import type_name
from aimv2_mllm.narration import Narrate

RESULTS, LOG, TABLE = "results.json", "log.txt", "table.md"
TASK = re.compile(r"yaml|\.yml$|\.py$")  # a name such as _default_template_yaml too


@dataclass(frozen=True)
class Benchmarking:
    """What is asked of lmms-eval: `tasks` as `benchmarks_of` takes them, of the `model` in a folder
    or of a hub id, and how; what comes of it is in `out`, and it runs in an `environment`."""

    model: str
    tasks: str
    out: Path = Path("lmms-eval")
    environment: Path = Path(".venv-lmms-eval")
    include_path: str | None = None  # where more tasks are
    limit: int | None = None
    batch_size: int = 8
    processes: int = 1
    dtype: str | None = None
    simple: bool = False


def commands(how: Benchmarking) -> str:
    """What `run_benchmarks` would run, a line for each command; a model of the hub has its commit
    there where that can be known now."""
    asked, folder = _checked(how)
    try:
        name, _ = _named(how.model, folder)
    except UsageError:  # the hub cannot be reached, and nothing of it is here
        name = how.model
    make = [sys.executable, "-m", "aimv2_mllm.lmms.environment", str(how.environment)]
    first = [] if python_of(how.environment).exists() else [make]
    words = [*first, *(_command(how, one, name) for one in asked.wanted)]
    return "\n".join(map(shlex.join, words))


def run_benchmarks(how: Benchmarking, narrate: Narrate) -> str:
    """The table of the numbers, written to `how.out` too; RunFailed with a line for each benchmark
    that failed."""
    asked, folder = _checked(how)
    there = inventory(demand_environment(how.environment, narrate), how.include_path)
    _demand_tasks(asked.wanted, there)
    name, model = _named(how.model, folder)
    identity = {
        "model": model,
        "limit": how.limit,
        "dtype": how.dtype,
        "simple": how.simple,
        "lmms_eval": there.version,
        "include_path": _digest_of_tasks(how.include_path),
    }
    for one in asked.wanted:
        demand_same(how.out / one.name, {"task": one.task, **identity})
    numbers, failed = dict[str, list[Number]](), dict[str, str]()
    for one in asked.wanted:
        try:
            command = _command(how, one, name)
            numbers[one.name] = _numbers(one, command, how.out / one.name, narrate)
        except (RunFailed, UsageError) as error:
            failed[one.name] = str(error)
            narrate(str(error))
        told = table(asked, numbers, failed)
        (how.out / TABLE).write_text(told, encoding="utf-8")
    if failed:
        narrate(told)
        raise RunFailed("\n".join(failed.values()))
    return told


def _checked(how: Benchmarking) -> tuple[Benchmarks, Path | None]:
    """What is to be run, and the model's folder, None where it is of the hub."""
    asked, folder = benchmarks_of(how.tasks), found(how.model)
    if wrong := [mark for mark in ",='\"{}" if mark in how.model]:
        raise UsageError(f"{how.model}: lmms-eval takes no {wrong[0]} in a name; link or move it")
    return asked, folder


def _named(model: str, folder: Path | None) -> tuple[str, str]:
    """What lmms-eval is to load, a model of the hub at its commit of now, and what tells it from
    others."""
    if folder is not None:
        return model, digest(folder)
    name, words = pinned(model)
    return "@".join([name, *words.values()]), f"{model} {words.get('revision')}"


def _digest_of_tasks(include: str | None) -> str | None:
    """What tells the tasks in a folder, and their code, from others; None without one."""
    if include is None:
        return None
    files = sorted(file for file in Path(include).rglob("*") if TASK.search(file.name))
    said = [f"{file.relative_to(include)} {sha256(file)}\n" for file in files if file.is_file()]
    return hashlib.sha256("".join(said).encode()).hexdigest()


def _command(how: Benchmarking, one: Benchmark, name: str) -> list[str]:
    """What runs lmms-eval for one benchmark, by a launcher where several processes are wanted."""
    launch = ["-m", "accelerate.commands.launch", "--num_processes", str(how.processes)]
    model = f"pretrained={name}" + (f",dtype={type_name(how.dtype)}" if how.dtype else "")
    python = str(python_of(how.environment))
    words = [python, *(launch if how.processes > 1 else []), "-m", "lmms_eval"]
    words += ["--model", MODEL, "--model_args", model, "--tasks", one.task]
    words += ["--batch_size", str(how.batch_size)]
    words += ["--output_path", str(how.out / one.name / "lmms-eval")]
    words += [] if how.limit is None else ["--limit", str(how.limit)]
    words += ["--include_path", how.include_path] if how.include_path else []
    return [*words, "--log_samples", *(["--force_simple"] if how.simple else [])]


def _demand_tasks(wanted: tuple[Benchmark, ...], there: Inventory) -> None:
    unknown = [one.task for one in wanted if one.task not in there.tasks]
    if unknown:
        lines = [
            f"lmms-eval {there.version} has no task {task}{nearest(task, there.tasks)}"
            for task in unknown
        ]
        raise UsageError("\n".join(lines))


def _numbers(one: Benchmark, command: list[str], folder: Path, narrate: Narrate) -> list[Number]:
    """The numbers of a benchmark, which is run where `folder` does not have them."""
    done = folder / RESULTS
    if done.exists():
        narrate(f"{one.name}: is done already")
        return numbers_of(done, one)
    narrate(shlex.join(command))
    before = set(folder.rglob("*_results.json"))
    code = _run(command, folder / LOG)
    made = sorted(set(folder.rglob("*_results.json")) - before)
    # lmms-eval ends with 0 whatever happened.
    if code or not made:
        why = _why((folder / LOG).read_text(encoding="utf-8", errors="replace"))
        raise RunFailed(f"{one.name}: {why or f'ended with {code}'}; see {folder / LOG}")
    replace_file(done, made[-1].read_bytes())
    return numbers_of(done, one)


def _run(command: list[str], log: Path) -> int:
    """The exit code of a command, whose words go to stderr and to the file `log`."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 65536):
            file.write(piece)
            sys.stderr.write(piece.decode(errors="replace"))
            sys.stderr.flush()
    return process.returncode


def _why(log: str) -> str | None:
    """What lmms-eval says of its own error, in a line."""
    log = re.sub(r"\x1b\[[0-9;]*m", "", log)
    said = re.findall(r"Error during evaluation: (.*)", log)
    if not said:
        errors = re.findall(r"^\w[\w.]*(?:Error|Exception): .*", log, re.MULTILINE)
        return str(errors[-1]) if errors else None
    why = str(said[-1]).partition(". Please set")[0]
    # It tries again for minutes, and then says only that it did.
    if tried := re.match(r"RetryError\[.* raised (\w+)>\]", why):
        raised = re.findall(rf"^(?:\w+\.)*{tried[1]}: (.*)", log, re.MULTILINE)
        why = raised[-1] if raised else why
    if "Currently messages is used for generation only" in why:
        why = "compares likelihoods: give --simple"
    if missing := re.search(r"No module named '(\w+)", why):
        why = f"needs the module {missing[1]}: install it in the environment"
    return why
