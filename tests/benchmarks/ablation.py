"""What of the objective makes the encoder: the table and the plot of runs of recipes/ablation.yaml.

python tests/benchmarks/ablation.py runs/ablation-* --out ablation.png
"""

import argparse
import json
from pathlib import Path
from statistics import mean

COLUMNS = {
    "digit_knn_accuracy": "digits by neighbours, %",
    "digit_linear_accuracy": "digits by a linear classifier, %",
    "caption_loss": "caption loss, nats per token",
}


def collect(runs: list[Path]) -> dict[str, dict[str, list[float]]]:
    """stage -> number -> its values, one of each run."""
    told = [json.loads((run / "summary.json").read_text())["pretrain_stages"] for run in runs]
    return {
        stage: {
            key: [one[stage][key] * (100 if key != "caption_loss" else 1) for one in told]
            for key in COLUMNS
        }
        for stage in told[0]
    }


def table(stages: dict[str, dict[str, list[float]]]) -> str:
    """Mean and range over the runs, as Markdown."""
    lines = [f"| stage | {' | '.join(COLUMNS.values())} |", "|---|" + "---:|" * len(COLUMNS)]
    for stage, numbers in stages.items():
        digits = {key: 3 if key == "caption_loss" else 1 for key in numbers}
        cells = [
            f"{mean(v):.{digits[k]}f} ({min(v):.{digits[k]}f} to {max(v):.{digits[k]}f})"
            for k, v in numbers.items()
        ]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(stages: dict[str, dict[str, list[float]]], out: Path) -> None:
    """One panel for each number: every run a dot, the mean a bar."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6), layout="constrained", dpi=150)
    names = [stage.replace("_", " ") for stage in stages]
    for column, (key, title) in enumerate(COLUMNS.items()):
        axes = figure.add_subplot(1, len(COLUMNS), column + 1)
        for row, numbers in enumerate(stages.values()):
            axes.barh(row, mean(numbers[key]), color="#8fb3d9", height=0.6)
            axes.plot(numbers[key], [row] * len(numbers[key]), "o", color="#1f4e85", markersize=4)
        axes.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
        axes.invert_yaxis()
        if key == "caption_loss":  # that of a decoder which never saw one is far off
            axes.set_xscale("log")
        axes.set_title(title, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


def main() -> None:
    """Print the table, and draw the plot where --out says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    stages = collect(args.runs)
    print(table(stages))
    if args.out is not None:
        plot(stages, args.out)


if __name__ == "__main__":
    main()
