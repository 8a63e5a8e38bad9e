"""Several pre-training stages in one recipe, side by side in its summary and report."""

import json
import sys
from pathlib import Path

import pytest
from conftest import RECIPES

from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.runs.run import run

sys.path.append(str(Path(__file__).parent / "benchmarks"))

STAGES = ("image_only", "captions_bidirectional", "captions_prefix", "both")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the real recipe, of two steps a stage."""
    folder = tmp_path_factory.mktemp("run") / "ablation"
    words = [f"output={folder}", "evaluation.questions=14", "evaluation.sheets=2"]
    for stage in STAGES:
        train = f"stages.{stage}.train"
        words += [f"{train}.steps=2", f"{train}.warmup_steps=0", f"{train}.log_every=1"]
    return run(load_recipe(RECIPES / "ablation.yaml", words), lambda line: None)


def test_every_encoder_is_judged_alike_and_the_last_one_in_full(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    compared = summary["pretrain_stages"]
    assert tuple(compared) == STAGES
    assert all(
        set(told) == {"caption_loss", "digit_knn_accuracy", "digit_linear_accuracy"}
        for told in compared.values()
    )
    assert compared["both"]["digit_knn_accuracy"] == summary["digit_knn_accuracy"]
    assert len({told["caption_loss"] for told in compared.values()}) == len(STAGES)
    assert "pixel_loss" in summary


def test_the_report_shows_them_in_a_table(finished: Path) -> None:
    for name in ("report.md", "report.html"):
        text = (finished / name).read_text().replace("\\_", "_")
        assert "The encoders side by side" in text
        assert all(stage in text for stage in STAGES)


def test_each_stage_learns_what_its_name_says(finished: Path) -> None:
    for stage, image, words in zip(STAGES, (1, 0, 0, 1), (0, 1, 1, 1), strict=True):
        lines = (finished / stage / "metrics.jsonl").read_text().splitlines()
        line = json.loads(lines[-1])
        assert (line["text"] > 0) == bool(words), stage
        weighted = words * line["text"] + 0.4 * image * line["image"]
        assert line["total"] == pytest.approx(weighted, rel=1e-5), stage


def test_several_runs_become_one_table_and_one_plot(finished: Path, tmp_path: Path) -> None:
    import ablation

    told = json.loads((finished / "summary.json").read_text())["pretrain_stages"]
    for number, share in enumerate((0.2, 0.9, 0.4)):
        (tmp_path / str(number)).mkdir()
        told["both"] |= {"digit_knn_accuracy": share, "caption_loss": share / 10}
        text = json.dumps({"pretrain_stages": told})
        (tmp_path / str(number) / "summary.json").write_text(text)
    stages = ablation.collect([tmp_path / str(number) for number in range(3)])
    table = ablation.table(stages)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {s}" for s in STAGES]
    [both] = [line for line in table.splitlines() if line.startswith("| both ")]
    assert "| 50.0 (20.0 to 90.0) |" in both
    assert "| 0.050 (0.020 to 0.090) |" in both
    ablation.plot(stages, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
