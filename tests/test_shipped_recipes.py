"""The recipes for real data run in miniature, and have the published numbers that they name."""

from pathlib import Path

import pytest
from conftest import RECIPES
from test_doctor import tower
from test_talks import table

from aimv2_mllm import __main__ as cli
from aimv2_mllm.recipe_file import load_recipe

LLAVA_STEPS = {"align": (558_128, 256, 1e-3), "tune": (665_298, 128, 2e-4)}


@pytest.mark.parametrize(
    "name", ["llava15_vicuna7b", "paper_llama3_8b", "qwen3_qlora_24gb", "small_laptop"]
)
def test_a_recipe_says_what_it_takes_and_has_its_tower_on_one_line(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    for word in ("command", "plan", "hardware", "time", "expect", "source"):
        assert f"\n# {word} " in text, word
    assert text.count("\n    tower: ") == 1
    assert f"aimv2-mllm run recipes/{name}.yaml" in text or f"run recipes/{name}.yaml" in text
    assert load_recipe(RECIPES / f"{name}.yaml").name == name


def test_llavas_recipe_goes_once_over_its_rows_with_its_rates() -> None:
    stages = load_recipe(RECIPES / "llava15_vicuna7b.yaml").stages
    for name, (rows, batch, lr) in LLAVA_STEPS.items():
        train = stages[name].train
        assert (train.steps, train.batch_size, train.lr) == (-(-rows // batch), batch, lr)
        assert train.warmup_steps == -(-3 * train.steps // 100)
        assert (train.weight_decay, train.final_lr, train.clip) == (0, 0, 1)
    assert stages["tune"].train.part_lr == {"connector": 2e-5}


def test_the_papers_recipe_has_its_table() -> None:
    train = load_recipe(RECIPES / "paper_llama3_8b.yaml").stages["tune"].train
    assert (train.steps, train.batch_size, train.warmup_steps) == (5000, 128, 250)
    assert (train.lr, train.part_lr, train.final_lr) == (1e-5, {"connector": 8 * 1e-5}, 0)
    assert (train.betas, train.weight_decay, train.clip) == ((0.9, 0.999), 0.01, 1)


def test_the_laptops_recipe_runs_in_miniature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heading = ["image", "question", "answer"]
    rows = [["a.jpg", f"How many are {colour}?", "2"] for colour in ("red", "blue", "green")]
    table(tmp_path / "photos", [heading, *rows])
    tower(tmp_path / "tower")
    words = ["stages.align.llm=tiny_llm", f"stages.align.tower={tmp_path / 'tower'}"]
    for stage in ("align", "tune"):
        words.append(f"stages.{stage}.data.sources.0.folder={tmp_path / 'photos'}")
        words += [f"stages.{stage}.train.{word}" for word in ("steps=3", "warmup_steps=1")]
    output = f"output={tmp_path / 'run'}"
    code = cli.main(["run", str(RECIPES / "small_laptop.yaml"), output, *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert f"chat {tmp_path / 'run'} --image PICTURE" in out
    assert (tmp_path / "run" / "tune" / "model" / "config.json").is_file()
