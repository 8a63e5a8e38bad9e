"""What of lmms-eval is to be run, and the numbers that come of it.

Owns the files in recipes/benchmarks/: which task and which of its metrics a benchmark is, and what
others have published. Refuses keys that it does not know.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aimv2_mllm.errors import UsageError, nearest, show

KEYS = {"task", "metric", "scale"}


@dataclass(frozen=True)
class Benchmark:
    """A task of lmms-eval, and which of its metrics is told, times `scale`; None: all of them."""

    name: str
    task: str
    metric: str | None = None
    scale: float = 1


@dataclass(frozen=True)
class Benchmarks:
    """What is to be run, in its order, and who published which number: row -> benchmark -> it."""

    wanted: tuple[Benchmark, ...]
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def benchmarks_of(tasks: str) -> Benchmarks:
    """The benchmarks of a file, where `tasks` ends in .yaml, else the tasks that it names, with
    commas between them. UsageError for a file that is none, and for names that are no folder's."""
    if tasks.endswith((".yaml", ".yml")):
        return _read(Path(tasks))
    names = [name.strip() for name in tasks.split(",")]
    if wrong := [name for name in names if not name or set(name) & set("/\\* ")]:
        raise UsageError(
            f"{wrong[0]!r} is no task: give names with commas between them, or a file such as "
            "recipes/benchmarks/paper.yaml"
        )
    return Benchmarks(tuple(Benchmark(name, name) for name in dict.fromkeys(names)))


def _read(path: Path) -> Benchmarks:
    import yaml

    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"{path}: cannot be read as YAML ({said})") from None
    if not isinstance(told, dict) or not isinstance(told.get("benchmarks"), dict):
        raise UsageError(f"{path}: names no benchmarks: NAME: {{task: ..., metric: ..., scale: 1}}")
    _demand_keys(path, "", told, {"benchmarks", "published"})
    wanted = tuple(_benchmark(path, str(name), one) for name, one in told["benchmarks"].items())
    published: dict[str, dict[str, float]] = told.get("published") or {}
    names = {benchmark.name for benchmark in wanted}
    for row, numbers in published.items():
        _demand_keys(path, f"published.{row}.", numbers, names)
    return Benchmarks(wanted, published)


def _benchmark(path: Path, name: str, told: Any) -> Benchmark:
    if not isinstance(told, dict) or not isinstance(told.get("task"), str):
        raise UsageError(f"{path}: benchmarks.{name} is {show(told)}, must name a task")
    _demand_keys(path, f"benchmarks.{name}.", told, KEYS)
    scale = told.get("scale", 1)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise UsageError(f"{path}: benchmarks.{name}.scale is {show(scale)}, must be a number")
    if "/" in name or name.startswith("."):
        raise UsageError(f"{path}: benchmarks.{name} cannot be the name of a folder")
    return Benchmark(name, told["task"], told.get("metric"), scale)


def _demand_keys(path: Path, where: str, told: Any, known: set[str]) -> None:
    for key in told if isinstance(told, dict) else {show(told)}:
        if key not in known:
            words = f"known are {', '.join(sorted(known))}{nearest(str(key), known)}"
            raise UsageError(f"{path}: {where}{key}: unknown key; {words}")


@dataclass(frozen=True)
class Number:
    """A metric of a benchmark, and its standard error where lmms-eval tells one."""

    metric: str
    value: float
    error: float | None


def numbers_of(file: Path, benchmark: Benchmark) -> list[Number]:
    """The numbers of `benchmark` in what lmms-eval wrote, scaled. UsageError where the metric is
    not there."""
    told = json.loads(file.read_text(encoding="utf-8"))["results"].get(benchmark.task, {})
    found = []
    for key, value in told.items():
        metric, _, way = key.partition(",")  # exact_match,none
        # A file's name, or null, is of what is sent in to be judged.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if "_stderr" in metric or not way or not is_number:
            continue
        error = told.get(f"{metric}_stderr,{way}")
        known = error * benchmark.scale if isinstance(error, int | float) else None
        name = metric if way == "none" else f"{metric} ({way})"
        found.append(Number(name, value * benchmark.scale, known))
    chosen = [one for one in found if benchmark.metric in (None, one.metric)]
    if not chosen:
        has = f"there is {', '.join(one.metric for one in found) or 'none'}"
        raise UsageError(
            f"{benchmark.name}: {benchmark.task} has no number {benchmark.metric}; {has}"
        )
    return chosen


def table(
    asked: Benchmarks, numbers: Mapping[str, Sequence[Number]], failed: Mapping[str, str]
) -> str:
    """Markdown: a line for each number, beside it what others have published."""
    rows = [["benchmark", "task", "metric", "here", *asked.published]]
    for one in asked.wanted:
        beside = [told.get(one.name) for told in asked.published.values()]
        known = ["–" if value is None else f"{value:,.10g}" for value in beside]
        for number in numbers.get(one.name, ()):
            rows.append([one.name, one.task, number.metric, _written(number), *known])
        if one.name not in numbers:
            state = "failed" if one.name in failed else "not yet run"
            rows.append([one.name, one.task, one.metric or "–", state, *known])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = [
        "-" * width if place < 3 else "-" * (width - 1) + ":" for place, width in enumerate(widths)
    ]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [
            text.ljust(width) if place < 3 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


def _written(number: Number) -> str:
    error = "" if number.error is None else f" ± {number.error:.2g}"
    return f"{number.value:,.4g}{error}"
