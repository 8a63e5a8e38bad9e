"""What the report of a comparison says, as plain data for its two templates.

Owns every sentence of it; refuses to compute: see `numbers`.
"""

from collections.abc import Mapping
from typing import Any

from aimv2_mllm.comparison import plots
from aimv2_mllm.evaluation.metrics import METRICS
from aimv2_mllm.formats import percent, percents
from aimv2_mllm.reports import charts
from aimv2_mllm.reports.charts import Picture

# A key of a group -> the head of its column, and how it is written.
COLUMNS = {
    "image_tokens": ("tokens of a picture", "{:,}"),
    "trained": ("trained parameters", "{:,}"),
    "train_tflop": ("training, TFLOP", "{:,.1f}"),
    "train_seconds": ("training, s", "{:,.0f}"),
    "memory_gib": ("memory in training, GiB", "{:.2f}"),
    "first_token_ms": ("first token, ms", "{:.1f}"),
}


def describe(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the templates say of a comparison, by the names they use."""
    metric, groups, seeds = METRICS[numbers["metric"]], numbers["groups"], numbers["seeds"]
    axes = [axis["name"] for axis in numbers["axes"]]
    label = f"{metric.title}, {metric.unit}"
    versions = ", ".join(f"{name} {number}" for name, number in numbers["versions"].items())
    heads, rows = _table(numbers)
    at_once = f", {numbers['jobs']} runs at a time" * (numbers["jobs"] > 1)
    return {
        "title": f"{numbers['recipe']}: {' × '.join(axes) or 'one run'}",
        "about": (
            f"{len(groups):,} combinations of {', '.join(axes)} with {len(seeds)} "
            f"seed{'s' * (len(seeds) > 1)} each, asked {numbers['num_questions']:,} questions of "
            f"{numbers['data']}, judged by {metric.title}."
        ),
        "heads": heads,
        "num_axes": len(axes),
        "rows": rows,
        "effects": [
            {
                **effect,
                "score": percent(effect["score"]),
                "behind": _behind(effect),
                "of_seeds": ", ".join(map(percent, effect["behind_of_seeds"].values())),
            }
            for effect in numbers["effects"]
        ],
        "pictures": _pictures(numbers, label) if groups else [],
        "facts": numbers["facts"],
        "failed": numbers["failed"],
        "command": numbers["command"],
        "made_with": (
            "Intervals are over pictures, each with all questions about it; where seeds differ by "
            "more than that, the seeds are what counts: a value is told apart from the best where "
            "0 is outside of the interval and several seeds all agree. What training took is of a "
            "run's own stages, not of those that all have in common; where features of the tower "
            "are kept, with one look of it through the pictures for each run, whichever that was "
            f"for; seconds are as the machine was{at_once}; the first token is the median of "
            f"single questions, nothing else running. {versions}."
        ),
    }


def as_table(numbers: Mapping[str, Any]) -> str:
    """The combinations as Markdown, for a terminal and a README."""
    heads, rows = _table(numbers)
    num_axes = len(numbers["axes"])
    rule = f"|{'---|' * num_axes}{'---:|' * (len(heads) - num_axes)}"
    return "\n".join(
        [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]
    )


def _table(numbers: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The heads of the table, and a row for each combination."""
    metric, groups = METRICS[numbers["metric"]], numbers["groups"]
    has_seeds = len(numbers["seeds"]) > 1
    controls = list(groups[0]["controls"]) if groups else []
    columns = [key for key in COLUMNS if key == "trained" or all(key in g for g in groups)]
    heads = [axis["name"] for axis in numbers["axes"]]
    heads += [f"{metric.title}, {metric.unit}", "95 % interval"]
    heads += ["least to most seed"] if has_seeds else []
    heads += [name.replace("_", " ") for name in controls] + [COLUMNS[key][0] for key in columns]
    rows = []
    for group in groups:
        values = {**group, "trained": sum(group["trained_parameters"].values())}
        row = [*group["values"], percent(group["score"]), percents(group["interval"])]
        row += [percents((group["least"], group["most"]))] if has_seeds else []
        row += [percent(group["controls"][name]) for name in controls]
        rows.append(row + [COLUMNS[key][1].format(values[key]) for key in columns])
    return heads, rows


def _behind(effect: Mapping[str, Any]) -> str:
    if effect["behind"] == 0:
        return "best"
    ends = percents(effect["behind_interval"])
    apart = "" if effect["told_apart"] else ", not told apart"
    return f"{percent(effect['behind'])} ({ends}) behind the best{apart}"


def _pictures(numbers: Mapping[str, Any], label: str) -> list[Picture]:
    groups, values = numbers["groups"], [axis["values"] for axis in numbers["axes"]]
    looks = (charts.LIGHT, charts.DARK)
    rows = [plots.score_rows(groups, palette, label) for palette in looks]
    panels = [plots.cost_panels(groups, values, palette, label) for palette in looks]
    return [
        Picture("scores.png", f"{label}, of each combination", *rows),
        Picture("costs.png", f"{label}, against what it costs", *panels),
    ]
