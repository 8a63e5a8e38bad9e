"""The pictures of a comparison: every combination's score, and scores against what they cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from aimv2_mllm.reports.charts import Palette, as_png, calm, new_figure

COLOURS = ("#2f6fb0", "#d1702a", "#3a9a5b", "#8a5fb5", "#c2a020", "#4ba3b8", "#b0476a", "#7a7a7a")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
COSTS = {
    "image_tokens": "tokens of a picture",
    "train_tflop": "training, TFLOP",
    "first_token_ms": "first token of an answer, ms",
    "memory_gib": "most memory in training, GiB",
}


def score_rows(groups: Sequence[Mapping[str, Any]], palette: Palette, label: str) -> bytes:
    """A row for each combination as PNG: mean with its interval, a dot for each seed, and the blind
    control."""
    figure = new_figure(7.4, 0.9 + 0.3 * len(groups), palette)
    axes = figure.add_subplot()
    calm(axes, palette)
    for row, group in enumerate(groups):
        low, high = (100 * end for end in group["interval"])
        axes.plot([low, high], [row, row], color=palette.series[0], linewidth=2.4, zorder=2)
        axes.plot(100 * group["score"], row, "o", color=palette.series[0], markersize=6, zorder=3)
        seeds = [100 * run["score"] for run in group["runs"]]
        axes.plot(
            seeds, [row] * len(seeds), "|", color=palette.ink, markersize=9, alpha=0.7, zorder=4
        )
        if "blind" in group["controls"]:
            axes.plot(100 * group["controls"]["blind"], row, "x", color=palette.faint, markersize=5)
    axes.set_yticks(range(len(groups)), [", ".join(group["values"]) for group in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, max(100, *(105 * group["interval"][1] for group in groups)))
    axes.set_xlabel(f"{label}: mean with 95 % interval, | a seed, × another picture", fontsize=8)
    return as_png(figure)


def cost_panels(
    groups: Sequence[Mapping[str, Any]], axis_values: Sequence[Sequence[str]], palette: Palette,
    label: str,
) -> bytes:  # fmt: skip
    """Score against each of `COSTS` as PNG; the first axis of the comparison is told by colour, the
    second by the mark."""
    costs = [cost for cost in COSTS if all(cost in group for group in groups)]
    figure = new_figure(3.7 * min(2, len(costs)), 2.9 * -(-len(costs) // 2) + 0.5, palette)
    for place, cost in enumerate(costs):
        axes = figure.add_subplot(-(-len(costs) // 2), min(2, len(costs)), place + 1)
        calm(axes, palette)
        for group in groups:
            colour, mark = _look(group, axis_values)
            low, high = (100 * end for end in group["interval"])
            axes.plot([group[cost]] * 2, [low, high], color=colour, linewidth=1.2, alpha=0.6)
            axes.plot(
                group[cost], 100 * group["score"], mark, color=colour, markersize=6, alpha=0.9
            )
        axes.set_xlabel(COSTS[cost], fontsize=8)
        axes.set_ylabel(label, fontsize=8)
        if cost == "image_tokens":
            _count_on_a_log_scale(axes, sorted({group[cost] for group in groups}))
        else:
            axes.set_xlim(0, 1.08 * max(group[cost] for group in groups))
            axes.locator_params(axis="x", nbins=5)
    for place, values in enumerate(axis_values[:2]):
        handles = [_key(n, value, place, palette) for n, value in enumerate(values)]
        figure.legend(
            handles=handles, loc="upper center", ncols=len(handles), frameon=False, fontsize=8,
            labelcolor=palette.ink, handletextpad=0.1, bbox_to_anchor=(0.5, 1.07 - 0.04 * place),
        )  # fmt: skip
    figure.tight_layout(pad=0.6, w_pad=2)
    return as_png(figure, as_laid_out=True)


def _key(number: int, value: str, place: int, palette: Palette) -> Line2D:
    """An entry of the legend for a value of the first or the second axis."""
    colour = palette.faint if place else COLOURS[number % len(COLOURS)]
    mark = MARKS[number % len(MARKS)] if place else "o"
    return Line2D([], [], color=colour, marker=mark, linestyle="", label=value)


def _look(group: Mapping[str, Any], axis_values: Sequence[Sequence[str]]) -> tuple[str, str]:
    places = [
        list(values).index(group["values"][n]) for n, values in enumerate(axis_values[:2])
    ] + [0, 0]
    return COLOURS[places[0] % len(COLOURS)], MARKS[places[1] % len(MARKS)]


def _count_on_a_log_scale(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set_xlim(counts[0] / 1.4, counts[-1] * 1.4)
