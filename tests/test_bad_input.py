"""What people give by mistake, on the command line: found before the run where that is possible,
else told in one clear line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_doctor import tower
from test_talks import llava_row, written

from aimv2_mllm import __main__ as cli
from aimv2_mllm.model.llms import TINY_LLM

RECIPE: dict[str, Any] = {
    "name": "bad",
    "stages": {
        "align": {
            "kind": "align",
            "tower": "./tower",
            "llm": "./llm",
            "data": {"sources": [{"kind": "llava", "file": "rows.jsonl", "root": "pictures"}]},
            "train": {"steps": 2, "batch_size": 4, "lr": 1e-3, "log_every": 1},
        }
    },
}
LITTLE_ROOM = {"max_position_embeddings": 40}
GOOD = llava_row("<image>\nWhich digit is red?", "7", image="0.jpg")
FIRST = llava_row("q", "a")
FIRST["conversations"].reverse()
BAD: dict[str, Any] = {
    "assistant_first": FIRST,
    "marks": llava_row("<image> and <image>?", "7", image="0.jpg"),
    "empty_answer": llava_row("<image>\nWhich?", " ", image="0.jpg"),  # nothing is supervised
    "outside_root": llava_row("<image>\nWhich?", "7", image="../outside.jpg"),
    "not_json": '{"id": 1, "conversations": [',
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe, a tower, an LLM, and rows to learn from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    rows(tmp_path, [GOOD] * 40)
    (tmp_path / "outside.jpg").write_bytes((tmp_path / "pictures" / "0.jpg").read_bytes())
    tower(tmp_path / "tower")
    shutil.copytree(TINY_LLM, tmp_path / "llm")
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    return tmp_path


def rows(folder: Path, them: list[Any]) -> None:
    written(folder / "pictures", them)
    (folder / "pictures" / "rows.jsonl").rename(folder / "rows.jsonl")


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    """The exit code of a command about the recipe, and the lines of its complaint."""
    verb, *others = words
    code = cli.main([verb, "recipe.yaml", *others])
    _, begins, complaint = capsys.readouterr().err.partition("aimv2-mllm: ")
    return code, f"{begins}{complaint}".splitlines()


def told_by_all(capsys: pytest.CaptureFixture[str], what: str, *others: str) -> None:
    """That doctor, the plan and the run's own check say `what` in one line each, with exit code 2,
    before anything is written."""
    for verb, *flags in (["doctor"], ["run", "--dry-run"], ["run"]):
        code, lines = told(capsys, verb, *others, *flags)
        assert code == 2, lines
        assert len(lines) == 1, lines
        assert what in lines[0], lines
        assert lines[0].startswith("aimv2-mllm: ")
    assert not Path("runs").exists()


def test_bad_rows_do_not_end_a_run_and_are_counted_by_why(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(folder, [*[GOOD] * 5, *BAD.values()] * 4)
    more = ("stages.align.data.max_skipped=0.95", "stages.align.train.steps=12")
    code, lines = told(capsys, "run", *more)
    assert code == 0, lines
    last = (folder / "runs" / "bad" / "align" / "metrics.jsonl").read_text().splitlines()[-1]
    skipped = {key for key in json.loads(last) if key.startswith("skipped_")}
    assert skipped == {f"skipped_{reason}" for reason in BAD}


@pytest.mark.parametrize("reason", BAD)
def test_a_share_of_bad_rows_is_found_before_the_run_and_ends_it(
    folder: Path, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    rows(folder, [GOOD, GOOD, BAD[reason]])
    code, lines = told(capsys, "doctor")
    assert code == 2
    [line] = lines
    assert f" {reason})" in line
    assert "rows.jsonl, row 2" in line or "outside.jpg" in line
    assert "more than the 5.0% that a run allows" in line
    words = [f"stages.align.train.{word}" for word in ("steps=60", "batch_size=8", "log_every=60")]
    code, lines = told(capsys, "run", *words)
    assert code == 1
    assert any(reason in line and "more than the 5.0%" in line for line in lines), lines


def test_a_tokenizer_without_a_chat_template_is_found_before_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "llm" / "chat_template.jinja").unlink()
    told_by_all(capsys, "its tokenizer has no chat template, so nobody knows how to talk to it")
    # LLaVA's own templates need none, and v1 a </s>, which this tokenizer has not.
    code, lines = told(capsys, "run", "stages.align.data.template=plain", "--dry-run")
    assert code == 0, lines
    code, lines = told(capsys, "run", "stages.align.data.template=v1", "--dry-run")
    assert code == 2
    assert any("template v1 writes" in line and "no answer would end" in line for line in lines)


def test_an_llm_without_room_for_a_picture_is_found_before_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "llm" / "config.json").read_text())
    config["max_position_embeddings"] = 19  # a picture of 28 pixels has 4 patches
    (folder / "llm" / "config.json").write_text(json.dumps(config))
    told_by_all(capsys, "./llm has room for 19 tokens (max_position_embeddings), and a picture")


def test_conversations_are_cut_to_the_room_of_the_llm(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((folder / "llm" / "config.json").read_text())
    (folder / "llm" / "config.json").write_text(json.dumps({**config, **LITTLE_ROOM}))
    turns = ["<image>\nWhich?", "7", *["Which digit is red?", "the first one"] * 4]
    rows(folder, [llava_row(*turns, image="0.jpg")] * 8)
    code, lines = told(capsys, "run")
    assert code == 0, lines
    last = (folder / "runs" / "bad" / "align" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["skipped_turns"] >= 8


def other_weights(llm: Path) -> None:
    weights = load_file(llm / "model.safetensors")
    save_file(
        {name: torch.zeros_like(w) for name, w in weights.items()},
        llm / "model.safetensors",
        {"format": "pt"},
    )


def test_a_result_and_a_checkpoint_of_another_llm_are_found_before_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(capsys, "run")[0] == 0
    other_weights(folder / "llm")
    for verb, *flags in (["doctor"], ["run", "--dry-run"], ["run"]):
        code, [line] = told(capsys, verb, *flags)
        assert code == 2
        assert "bad/align/model: was made from another LLM, tower or stage than now" in line
    shutil.rmtree(folder / "runs" / "bad" / "align" / "model")  # as if it had been stopped
    for verb, *flags in (["doctor"], ["run", "--dry-run"]):
        code, [line] = told(capsys, verb, *flags)
        assert code == 2
        assert "bad/align/checkpoints: is of another LLM, tower or stage than now" in line
    code, [line] = told(capsys, "run")
    assert code == 2
    assert "belongs to another run" in line


def test_a_plan_without_the_rows_counts_long_ones_and_kept_features_spare_the_tower(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def planned(*words: str) -> str:
        cli.main(["run", "recipe.yaml", "stages.align.data.max_tokens=300", *words, "--dry-run"])
        return capsys.readouterr().out

    kept = planned("stages.align.data.features={folder: kept}")
    assert "features 4x4x" in kept
    assert "pixel_values" not in kept
    assert "features of all pictures are counted as kept" in kept
    assert "weights aside 0.0 MiB" not in kept  # the tower stays with the process
    (folder / "rows.jsonl").unlink()
    long = planned()
    assert "input_ids 1x1200" in long
    assert "weights aside 0.0 MiB" in long
    assert "no conversations at hand: all are counted with 300 tokens" in long
