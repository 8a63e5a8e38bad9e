"""A run that ends with a LiT stage: judged by the words for digits that no step has seen."""

import json
from pathlib import Path

import pytest
import torch
from test_encoder_stages import lit

from aimv2_mllm import __main__ as command
from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.evaluation.zeroshot import handwriting_templates, load_lit_tower
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.runs.run import run
from aimv2_mllm.stages.table import STAGES


@pytest.fixture(scope="module")
def finished(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lit") / "run"
    recipe = lit(tiny_run, folder).recipe
    judged = recipe.model_dump() | {"evaluation": {"questions": 7, "sheets": 1}}
    run(Recipe.model_validate(judged), lambda _: None)
    return folder


def test_summary_and_report_say_how_many_digits_the_words_tell(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    accuracy = summary["digit_zeroshot_accuracy"]
    low, high = summary["digit_zeroshot_accuracy_interval"]
    assert 0 <= low <= accuracy <= high <= 1
    assert 0 <= summary["digit_zeroshot_accuracy_shuffled"] <= 1
    assert summary["digit_zeroshot_accuracy_majority"] == pytest.approx(0.1, abs=0.01)
    text = (finished / "report.md").read_text()
    assert f"single digits told by their words alone | **{100 * accuracy:.1f} %**" in text
    assert "A text tower learned here" in text
    assert "--kind zeroshot" in text


def test_the_probe_of_the_command_line_gives_the_same(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = finished / "templates.txt"
    file.write_text("\n".join(handwriting_templates()))
    words = ["--kind", "zeroshot", "--templates", str(file), "--out", str(finished / "out.json")]
    model = str(finished / "next" / "model")
    assert command.main(["probe", model, "handwriting", *words]) == 0
    assert "each class by another's prompts" in capsys.readouterr().out
    found = json.loads((finished / "out.json").read_text())["probes"]["zeroshot"]["accuracy"]
    assert found == json.loads((finished / "summary.json").read_text())["digit_zeroshot_accuracy"]


def test_prompts_are_read_as_captions_were(finished: Path, tiny_run: Path) -> None:
    where = lit(tiny_run, finished)
    batch = STAGES["lit"].build(where.recipe.stages["next"], where).batches(0)[0]
    _, encode = load_lit_tower(str(finished / "next" / "model"))
    seed = where.recipe.seed << 64
    captions = [scenes.caption(scenes.scene(seed, "train", number)) for number in range(4)]
    for row, length, ids in zip(
        encode(captions), batch["caption_length"].tolist(), batch["caption_ids"], strict=True
    ):
        assert torch.equal(row[:length], ids[:length])
        assert row[length] == 1  # <|end|>


def test_a_template_for_every_ink_and_place() -> None:
    templates = handwriting_templates()
    assert len(set(templates)) == 24
    assert "an orange {} at the bottom left" in templates
