"""Whether the runs of a comparison can be compared, in sentences: what was equal in all of them and
what was not."""

from collections.abc import Mapping, Sequence
from typing import Any

from aimv2_mllm.comparison.grid import Cell, Grid
from aimv2_mllm.recipe.schema import deciding


def facts_of(grid: Grid, groups: Sequence[Mapping[str, Any]], num_apart: int) -> list[str]:
    """Whether runs can be compared: what was equal in all of them, and what was not."""
    if not groups:
        return []
    facts = ["Every run answered the same questions."]
    if num_apart:
        facts = [f"{num_apart:,} questions that not all runs answered do not count."]
    seeds = {tuple(run["seed"] for run in group["runs"]) for group in groups}
    if len(seeds) > 1:
        facts.append("NOT the same seeds: some runs failed; effects are of those that all have.")
    facts.append(_about_samples(grid, groups))
    for key, what in (
        ("image_tokens", "tokens of a picture"),
        ("trained", "trained parameters"),
        ("parameters", "parameters in all"),
        ("targets", "supervised tokens"),
    ):
        counts = [
            sum(group["trained_parameters"].values()) if key == "trained" else group.get(key)
            for group in groups
        ]
        known = sorted({count for count in counts if count is not None})
        if known:
            even = len(known) == 1
            many = f"{known[0]:,}" if even else f"{known[0]:,} to {known[-1]:,}"
            facts.append(f"{'Equal' if even else 'NOT equal'}: {what}, {many}.")
    return facts


def _about_samples(grid: Grid, groups: Sequence[Mapping[str, Any]]) -> str:
    """Whether the runs of a seed learned from the same samples, as their recipes have it and as far
    as the counts of what they left out or cut tell."""
    of_seed = [_samples_of(cell) for cell in grid.cells if cell.seed == grid.seeds[0]]
    if any(one != of_seed[0] for one in of_seed):
        return "NOT the same samples in the same order: what varies changes the data or the steps."
    runs = [run for group in groups for run in group["runs"]]
    for seed in grid.seeds:
        own = [run for run in runs if run["seed"] == seed]
        # Without any left out the samples are the same, whatever an LLM's tokens are.
        seen = [(run["skipped"], run["targets"]) for run in own]
        if any(run["skipped"] for run in own) and any(one != seen[0] for one in seen):
            counts = [sum(run["skipped"].values()) for run in own]
            return (
                "NOT the same samples: rows or turns that were too long or unusable were left out, "
                f"{min(counts):,} to {max(counts):,} of a run with seed {seed}."
            )
    alike = "The same samples in the same order, in the same number of steps"
    return f"{alike}, for every run of a seed."


def _samples_of(cell: Cell) -> list[Any]:
    stages = [deciding(stage.model_dump(mode="json")) for stage in cell.recipe.stages.values()]
    return [
        (stage["data"], stage["train"]["steps"], stage["train"]["batch_size"]) for stage in stages
    ]
