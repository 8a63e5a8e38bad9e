"""The doctor tells what is sound of a recipe, and every problem in a line: weights, shapes,
samples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RECIPES
from test_talks import llava_row, written
from tiny_towers import saved
from torch import nn

from aimv2_mllm import __main__ as cli
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.weights import save_encoder
from aimv2_mllm.planning.doctor import examine
from aimv2_mllm.planning.doctor_samples import Report, examine_talks
from aimv2_mllm.recipe.schema import Recipe

TRAIN = {"steps": 2, "batch_size": 4, "lr": 1e-2}


def examined(recipe: Recipe) -> tuple[str, list[str]]:
    """What is said of a recipe, and its problems in words."""
    lines: list[str] = []
    problems = examine(recipe, lines.append)
    return "\n".join(lines), list(map(str, problems))


def aligned(folder: Path, source: dict[str, Any], **data: Any) -> Recipe:
    """A recipe that aligns a tiny tower in `folder` on one source."""
    if not (folder / "tower").exists():
        tower(folder / "tower")
    align = {
        "kind": "align",
        "tower": str(folder / "tower"),
        "llm": "tiny_llm",
        "data": {"sources": [source], **data},
        "train": TRAIN,
    }
    plain = {"name": "doctor", "output": folder / "run", "stages": {"align": align}}
    return Recipe.model_validate(plain)


def tower(folder: Path, broken: bool = False) -> None:
    torch.manual_seed(0)
    encoder = AIMv2Encoder(EncoderConfig(16, 24, 2, 2, image_size=28))
    if broken:
        next(encoder.parameters()).data.view(-1)[3] = torch.nan
    save_encoder(encoder, folder)
    Preprocessing(28).save(folder)


def test_the_quickstart_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"output={tmp_path / 'run'}"
    code = cli.main(["doctor", str(RECIPES / "quickstart.yaml"), output])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    for words in (
        "versions: python ",
        f"torch {torch.__version__}",
        "captions: 7 to 31 tokens",
        "max_text_tokens 64 cuts 0.0 %",
        "stage pretrain has no result yet",
        "image: 56 x 56 pixels, 4 x 4 patches, 128 wide, become 16 tokens, 128 wide",
        "LoRA: 28 modules, none in the vision tower",
        "samples: 16 image tokens for each of 64 pictures",
        "image       <image> (16 tokens)\nshow  not learned ' Say what you see.",
        "no problem found",
    ):
        assert words in out, words
    assert not list(tmp_path.iterdir())


def test_captions_that_are_cut_are_counted_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"output={tmp_path / 'run'}", "stages.pretrain.decoder.max_text_tokens=4"]
    assert cli.main(["doctor", str(RECIPES / "quickstart.yaml"), *words]) == 0
    out = capsys.readouterr().out
    assert "max_text_tokens 4 cuts 100.0 %" in out
    assert "learned     ' an orange 8 at' and the end token\nshow  cut off     ' the" in out


def test_a_missing_picture_and_a_silent_row_are_problems_with_their_names(tmp_path: Path) -> None:
    rows = [
        llava_row("<image>\nWhich?", "7", image="0.jpg"),
        llava_row("<image>\nWhich?", "8", image="1.jpg"),
        llava_row("<image>\nWhich?", "9", image="gone.jpg"),
        llava_row("<image>\nWhich?", "", image="2.jpg"),
    ]
    source = written(tmp_path, rows)
    said, problems = examined(aligned(tmp_path, source))
    assert "tower: " in said
    assert "finite, strictly loaded from" in said
    [problem] = problems
    assert problem.startswith("stages.align.data.max_skipped: ")
    assert "gone.jpg" in problem
    assert "row 3: " in problem
    assert "more than the 5.0% that a run allows" in problem
    said, problems = examined(aligned(tmp_path, source, max_skipped=0.9))
    assert not problems
    assert "gone.jpg" in said


def test_where_nothing_is_learned_at_all_it_is_a_problem(tmp_path: Path) -> None:
    rows = [llava_row("<image>\nWhich?", "", image="0.jpg")] * 3
    said, problems = examined(aligned(tmp_path, written(tmp_path, rows), template="plain"))
    [problem] = problems
    assert problem.startswith("stages.align.data")
    assert "show" not in said


def test_weights_that_are_no_numbers_are_a_problem(tmp_path: Path) -> None:
    tower(tmp_path / "tower", broken=True)
    said, problems = examined(aligned(tmp_path, {"kind": "handwriting"}))
    [problem] = problems
    assert problem.startswith("stages.align.tower: the vision tower from")
    assert "not finite" in problem
    assert "strictly loaded" not in said


def tuned(folder: Path, **base: str) -> Recipe:
    """A recipe that tunes what `base` names, on the embedded world."""
    stages = {"tune": {"kind": "tune", "train": TRAIN, **base}}
    return Recipe.model_validate({"name": "doctor", "output": folder / "run", "stages": stages})


def test_a_tune_stage_may_begin_with_a_tower_of_another_family(tmp_path: Path) -> None:
    saved("siglip", tmp_path / "tower")
    said, problems = examined(tuned(tmp_path, tower=str(tmp_path / "tower"), llm="tiny_llm"))
    assert not problems
    assert "finite, strictly loaded from" in said


def test_a_tune_stage_may_start_from_a_run(tiny_run: Path, tmp_path: Path) -> None:
    said, problems = examined(tuned(tmp_path, start=str(tiny_run)))
    assert not problems
    assert "LoRA: 28 modules, none in the vision tower" in said
    _, [problem] = examined(tuned(tmp_path, start=str(tiny_run / "pretrain")))
    assert problem.startswith("stages.tune.start: ")


def test_a_damaged_picture_is_told_beside_what_else_is_sound(tmp_path: Path) -> None:
    rows = [llava_row("<image>\nWhich?", "7", image=f"{i}.jpg") for i in range(4)]
    source = written(tmp_path, rows)
    (tmp_path / "3.jpg").write_bytes(b"no picture")
    _, problems = examined(aligned(tmp_path, source))
    [problem] = problems
    assert "undecodable), such as" in problem
    assert problem.count("row 3: is not a picture") == 1


def test_the_problems_end_the_command_with_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower(tmp_path / "tower", broken=True)
    plain = aligned(tmp_path, {"kind": "handwriting"}).model_dump(mode="json")
    plain["stages"]["align"]["data"]["sources"] = [{"kind": "questions", "folder": "nowhere"}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(plain))
    assert cli.main(["doctor", str(tmp_path / "recipe.yaml")]) == 2
    out, err = capsys.readouterr()
    assert "left out: samples" in out
    assert len(err.splitlines()) == 2, err
    assert "aimv2-mllm: stages.align.data.sources.0: " in err
    assert "aimv2-mllm: stages.align.tower: " in err


class Adapted(nn.Module):
    """Stands for a model with LoRA on the named module."""

    def __init__(self, part: str) -> None:
        super().__init__()
        layer = nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(2, 2)})})
        self.base = nn.ModuleDict({part: nn.ModuleDict({"q_proj": layer})})


def test_lora_in_the_tower_is_a_problem() -> None:
    from aimv2_mllm.planning.doctor import examine_lora

    for part, count in (("language_model", 0), ("vision_tower", 1)):
        report = Report(lambda _: None)
        examine_lora("tune", Adapted(part), report)
        assert len(report.problems) == count
    assert "base.vision_tower.q_proj.lora_A" in str(report.problems[0])


def test_places_that_the_model_does_not_fill_are_a_problem() -> None:
    from test_talks import batches_of

    from aimv2_mllm.stages.job import DataFacts, Job

    batches = batches_of({"kind": "handwriting"})  # of four tokens a picture
    job = Job(nn.Module(), {}, None, batches, lambda _: None, DataFacts())
    for count, problems in ((4, 0), (5, 1)):
        report = Report(lambda _: None)
        examine_talks("data", job, batches, count, report)
        assert len(report.problems) == problems
    assert "4 image tokens for 1 pictures" in str(report.problems[0])


def test_the_result_of_a_finished_stage_is_looked_at_itself(tmp_path: Path) -> None:
    plain = aligned(tmp_path, {"kind": "handwriting"}).model_dump(mode="json")
    see = {
        "kind": "pretrain",
        "encoder": {"size": "aimv2_nano", "image_size": 28},
        "tokenizer": "tiny_llm",
        "train": TRAIN,
        "data": {"sources": [{"kind": "folder", "folder": "gone"}]},  # needed no more
    }
    plain["stages"] = {"see": see, "align": {**plain["stages"]["align"], "tower": "see"}}
    for broken in (False, True):
        tower(tmp_path / "run" / "see" / "model", broken)
        said, problems = examined(Recipe.model_validate(plain))
        assert "stage see (pretrain): finished" in said
        assert "28 x 28 pixels, 2 x 2 patches, 16 wide, become 4 tokens" in said
        assert len(problems) == broken
        assert ("strictly loaded" in said) != broken
