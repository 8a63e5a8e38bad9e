"""The numbers of a comparison: what the runs of each combination are worth, and what they took.

Scores are compared on the same questions. Refuses runs that answered others.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aimv2_mllm.comparison.evaluate import RESULTS
from aimv2_mllm.comparison.fairness import facts_of
from aimv2_mllm.comparison.grid import Cell, Grid
from aimv2_mllm.comparison.tasks import answers_in
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation.asking import SEEN
from aimv2_mllm.evaluation.controls import SHOWN
from aimv2_mllm.evaluation.intervals import bootstrap_interval, interval
from aimv2_mllm.folders import STAGE_FILE, result_of

Scores = dict[str, np.ndarray]  # pass -> (Q,) a score for each question


def numbers_of(
    grid: Grid,
    failed: Mapping[Path, str],
    speed: Mapping[tuple[str, ...], Mapping[str, Any]],
    asked: str,
    *,
    are_shares: bool = True,
) -> dict[str, Any]:
    """Every number of the comparison as plain data: `groups`, one for each combination with its
    runs, `effects` of each axis, `failed` runs, and `facts` about its fairness. `asked` tells
    which answers count, see `answers_in`, and scores `are_shares` where each is 0 or 1."""
    found = {c.folder: _answers(c, asked) for c in grid.cells if c.folder not in failed}
    ids = _common([list(one) for one in found.values()])
    scores = {folder: _of_questions(one, ids) for folder, one in found.items()}
    first: Mapping[str, Any] = next(iter(found.values()), {})
    pictures = [first[name].get("picture") or name for name in ids]
    ends = partial(interval, groups=pictures, are_shares=are_shares)
    groups = []
    for values in dict.fromkeys(cell.values for cell in grid.cells):
        cells = [c for c in grid.cells if c.values == values and c.folder in scores]
        if cells:
            own = [scores[cell.folder] for cell in cells]
            groups.append(_group(grid, cells, own, ends) | dict(speed.get(values, {})))
    seen = {
        (*cell.values, str(cell.seed)): scores[cell.folder][SEEN]
        for cell in grid.cells
        if cell.folder in scores
    }
    places = range(len(grid.axes))
    most = max((len(one) for one in found.values()), default=0)
    return {
        "num_questions": len(ids),
        "seeds": grid.seeds,
        "axes": [{"name": a.word, "values": [a.shown(v) for v in a.values]} for a in grid.axes],
        "groups": groups,
        "effects": [effect for place in places for effect in _effects(grid, place, seen, pictures)],
        "failed": [
            {"run": _named(grid, cell), "why": failed[cell.folder]}
            for cell in grid.cells
            if cell.folder in failed
        ],
        "facts": facts_of(grid, groups, most - len(ids)),
    }


def _named(grid: Grid, cell: Cell) -> str:
    return f"{grid.named(cell.values)}, seed {cell.seed}"


def _answers(cell: Cell, asked: str) -> dict[str, dict[str, Any]]:
    """What was told of every question, by its id."""
    path = answers_in(cell, asked) / RESULTS
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["id"]: line for line in lines}


def _common(asked: Sequence[Sequence[str]]) -> list[str]:
    """The ids of those questions that all runs answered, in their order."""
    everywhere = set(asked[0]).intersection(*asked[1:]) if asked else set()
    if asked and not everywhere:
        raise UsageError("the runs have no question in common; remove what holds other questions")
    return [name for name in asked[0] if name in everywhere] if asked else []


def _of_questions(found: Mapping[str, Mapping[str, Any]], ids: Sequence[str]) -> Scores:
    passes = [name for name in (SEEN, *SHOWN) if name in found[ids[0]]]
    return {name: np.array([found[one][name]["score"] for one in ids]) for name in passes}


def _group(
    grid: Grid, cells: Sequence[Cell], scores: Sequence[Scores], ends: Callable[..., Any]
) -> dict[str, Any]:
    """One combination: its score over the seeds with the interval that `ends` makes of it, its
    controls, and what it took."""
    runs = [_run(cell, found) for cell, found in zip(cells, scores, strict=True)]
    mean = np.mean([found[SEEN] for found in scores], axis=0)
    first = runs[0]
    return {
        "values": [axis.shown(v) for axis, v in zip(grid.axes, cells[0].values, strict=True)],
        "score": float(mean.mean()),
        # Over pictures with their questions: the seeds' own spread stands beside it.
        "interval": list(ends(mean.tolist())),
        "least": min(run["score"] for run in runs),
        "most": max(run["score"] for run in runs),
        "controls": {
            name: float(np.mean([found[name].mean() for found in scores]))
            for name in SHOWN
            if name in scores[0]
        },
        **{key: first[key] for key in ("trained_parameters", "parameters", "samples", "targets")},
        **{
            key: round(float(np.mean([run[key] for run in runs])), 3)
            for key in ("train_tflop", "train_seconds", "memory_gib")
        },
        "runs": runs,
    }


def _run(cell: Cell, scores: Scores) -> dict[str, Any]:
    records = [
        json.loads((result_of(cell.recipe.output, name) / STAGE_FILE).read_text(encoding="utf-8"))
        for name in cell.recipe.stages
    ]
    parts = [part for record in records for part in record["parts"]]
    passes = _passes(records)
    memory = [
        record["last"].get("accelerator_gib", record["last"]["memory_gib"]) for record in records
    ]
    return {
        "seed": cell.seed,
        "folder": str(cell.folder),
        "score": float(scores[SEEN].mean()),
        "trained_parameters": {name: count for name, count, trained in parts if trained},
        "parameters": sum(count for _, count, _ in records[-1]["parts"]),
        "samples": sum(record["last"]["samples"] for record in records),
        "targets": sum(record["last"]["tokens"] for record in records),
        "skipped": _skipped(records),
        "train_tflop": sum([*(one["last"]["flops"] for one in records), passes["flops"]]) / 1e12,
        "train_seconds": sum([*(one["seconds"] for one in records), passes["seconds"]]),
        "memory_gib": max(memory),
    }


def _skipped(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The rows and turns that were left out in all stages, by reason."""
    counts = Counter[str]()
    for record in records:
        found = {k: count for k, count in record["last"].items() if k.startswith("skipped_")}
        counts.update({key.removeprefix("skipped_"): count for key, count in found.items()})
    return dict(counts)


def _passes(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What one look through the pictures takes whose features are kept, whoever computed them: once
    for stages of the same pictures and tower."""
    kept = [one["features"] for one in records if "took" in one.get("features", {})]
    once = {facts["of"]: facts["took"] for facts in kept}.values()
    return {key: sum(took[key] for took in once) for key in ("flops", "seconds")}


def _effects(
    grid: Grid,
    place: int,
    scores: Mapping[tuple[str, ...], np.ndarray],
    pictures: Sequence[str],
) -> list[dict[str, Any]]:
    """What each value of an axis is worth over the others: means over those combinations of the
    other axes, and those seeds, with which every value's run ended well, and the difference to the
    best value, in each of the seeds too. `scores` are by the values of a run and, last, its seed.

    A value is told apart from the best by an interval over pictures, with the questions about each
    together, without 0, and by several seeds that all agree.
    """
    axis = grid.axes[place]
    if len(axis.values) < 2:
        return []

    def others(values: tuple[str, ...]) -> tuple[str, ...]:
        return values[:place] + values[place + 1 :]

    of_value = {
        value: {others(v): s for v, s in scores.items() if v[place] == value}
        for value in axis.values
    }
    complete = set.intersection(*(set(found) for found in of_value.values()))
    if not complete:
        return []
    means = {value: _mean(found, complete) for value, found in of_value.items()}
    best = max(means, key=lambda value: float(means[value].mean()))
    seeds = {seed: [rest for rest in complete if rest[-1] == str(seed)] for seed in grid.seeds}
    effects = []
    for value, found in of_value.items():
        behind = means[best] - means[value]
        of_seeds = {
            seed: float((_mean(of_value[best], some) - _mean(found, some)).mean())
            for seed, some in seeds.items()
            if some
        }
        low, high = bootstrap_interval(behind.tolist(), groups=pictures)
        effects.append(
            {
                "axis": axis.word,
                "value": axis.shown(value),
                "score": float(means[value].mean()),
                "over": len(complete),
                "behind": float(behind.mean()),
                "behind_interval": [low, high],
                "behind_of_seeds": of_seeds,
                "told_apart": low > 0 and len(of_seeds) > 1 and min(of_seeds.values()) > 0,
            }
        )
    return effects


def _mean(
    scores: Mapping[tuple[str, ...], np.ndarray], runs: Iterable[tuple[str, ...]]
) -> np.ndarray:
    """The mean score of every question over these runs: (Q,)."""
    mean: np.ndarray = np.mean([scores[run] for run in sorted(runs)], axis=0)
    return mean
