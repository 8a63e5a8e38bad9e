"""Align and tune on conversations of one's own, from a file to a model: interrupted, resumed,
refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from llava_world import make_llm
from test_corpus_run import Killed, die_in_step_5
from test_talks import llava_row, save_table, table, written

from aimv2_mllm import __main__ as command
from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.engine import metrics
from aimv2_mllm.errors import RunFailed
from aimv2_mllm.model.hub import locate
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.runs import run as runs

RECIPE = """\
name: talks
stages:
  see:
    kind: pretrain
    encoder: {{size: aimv2_nano, image_size: 28}}
    decoder: {{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1,
              num_attention_heads: 2, max_text_tokens: 40}}
    tokenizer: tiny_llm
    train: {{steps: 1, batch_size: 2, lr: 1e-3}}
  align:
    kind: align
    tower: see
    llm: tiny_llm
    data:
      template: plain
      sources: [{{kind: llava, file: {folder}/captions.json, root: {folder}}}]
    train: {{steps: 7, batch_size: 4, micro_batch_size: 2, lr: 1e-3, log_every: 1,
            checkpoint_every: 3}}
  tune:
    kind: tune
    start: align
    data:
      template: {template}
      max_tokens: 60
      sources:
        - {{kind: llava, file: {folder}/rows.jsonl, weight: 2}}
        - {{kind: questions, folder: {folder}/photos}}
        - {{kind: texts, dataset: {folder}/table}}
    train: {{steps: 7, batch_size: 4, micro_batch_size: 2, lr: 1e-3, log_every: 1,
            checkpoint_every: 3}}
"""


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with conversations of three kinds, and a recipe that learns from them."""
    from datasets import Image as Pictures
    from datasets import List, Value

    text = Value("string")
    captions = [
        llava_row("Say.\n<image>", scenes.caption(scenes.scene(0, "train", i)), image=f"{i}.jpg")
        for i in range(4)
    ]
    (tmp_path / "captions.json").write_text(json.dumps(captions, indent=1))
    rows = [
        llava_row("<image>\nWhich digit is red?", "7", "Where is it?", "top left", image="0.jpg"),
        llava_row("Say a colour.", "red"),
        llava_row("Say a digit.", "7"),
        llava_row("<image> or <image>?", "the first " * 3, image=["1.jpg", "2.jpg"]),
        llava_row("<image>\nlong", "a", "b " * 60, "c", image="3.jpg"),
    ]
    written(tmp_path, rows)
    heading = ["image", "question", "answer"]
    table(tmp_path / "photos", [heading, ["a.jpg", "How many?", "2"], ["a.jpg", "Red?", "no"]])
    picture = {"bytes": (tmp_path / "0.jpg").read_bytes(), "path": None}
    save_table(
        tmp_path / "table",
        [{"images": [picture], "texts": [{"user": "Red?", "assistant": "no"}]}] * 2,
        {"images": List(Pictures()), "texts": List({"user": text, "assistant": text})},
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path, template="chat"))
    return tmp_path


def run(world: Path, output: str, *words: str) -> list[str]:
    said: list[str] = []
    overrides = [f"output={world / output}", *words]
    runs.run(load_recipe(world / "recipe.yaml", overrides), said.append)
    return said


def results(folder: Path) -> dict[str, Any]:
    """The metrics of each stage without their timings, and the digests of its files."""
    found = {}
    for stage in ("align", "tune"):
        lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
        kept = [
            {k: v for k, v in json.loads(line).items() if k not in metrics.TIMED_FIELDS}
            for line in lines
        ]
        found[stage] = (
            kept,
            json.loads((folder / stage / "model" / "stage.json").read_text())["files"],
        )
    return found


BY_TOKENS = [
    f"stages.{stage}.train.micro_batch_{rest}"
    for stage in ("align", "tune")
    for rest in ("size=null", "tokens=70")
]


@pytest.mark.parametrize("how", [[], BY_TOKENS], ids=["by samples", "by tokens"])
def test_a_run_on_conversations_is_the_same_with_workers_and_after_a_kill(
    world: Path, monkeypatch: pytest.MonkeyPatch, how: list[str]
) -> None:
    said = run(world, "whole", *how)
    assert f"  5 rows, the first is {world}/rows.jsonl, row 0" in said
    whole = results(world / "whole")
    lines = whole["tune"][0]
    assert lines[-1]["skipped_turns"] >= 1
    assert all(line["text"] > 0 for line in lines)
    die_in_step_5(monkeypatch)
    with pytest.raises(Killed):
        run(world, "killed", "stages.align.data.workers=1", *how)
    monkeypatch.undo()
    assert "continuing from step 3" in run(world, "killed", "stages.tune.data.workers=1", *how)
    assert results(world / "killed") == whole


def test_a_run_goes_on_with_micro_batches_by_tokens_to_the_same_losses(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(world, "samples")
    die_in_step_5(monkeypatch)
    with pytest.raises(Killed):
        run(world, "changed")
    monkeypatch.undo()
    assert "continuing from step 3" in run(world, "changed", *BY_TOKENS)
    for stage in ("align", "tune"):
        old, new = (results(world / name)[stage][0] for name in ("samples", "changed"))
        for was, now in zip(old, new, strict=True):
            assert now == pytest.approx(was, abs=1e-4, rel=1e-4)


def test_a_model_tuned_in_llavas_way_is_talked_to_in_it(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "recipe.yaml").write_text(RECIPE.format(folder=world, template="v1"))
    words = ["stages.align.train.steps=1", "stages.tune.train.steps=1"]
    words += ["stages.tune.data.max_tokens=400", f"stages.align.llm={world / 'llm'}"]
    make_llm(world / "llm")  # a Llama, which knows </s>
    code = command.main(["run", str(world / "recipe.yaml"), f"output={world / 'run'}", *words])
    assert code == 0
    said = capsys.readouterr().out
    assert f"chat {world / 'run'} --image PICTURE" in said
    assert " sample " not in said
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(locate(str(world / "run" / "tune" / "model")))
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Red?"}]}],
        add_generation_prompt=True,
    )
    assert prompt.endswith("answers to the user's questions. USER: <image>\nRed? ASSISTANT:")


def test_too_many_bad_rows_end_the_run_by_name(world: Path) -> None:
    rows = [llava_row("<image>", "a", image=f"{number % 6}.jpg") for number in range(6)]
    written(world, rows)
    words = ["stages.align.train.steps=1", "stages.tune.train.steps=60"]
    with pytest.raises(RunFailed) as error:
        run(world, "run", *words, "stages.tune.train.log_every=60")
    message = str(error.value)
    assert "unreadable), more than the 5.0% that data.max_skipped allows, such as" in message
    assert "rows.jsonl, row " in message
    assert "4.jpg: cannot be read" in message


def test_what_is_missing_is_told_before_anything_is_trained(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (world / "photos" / "questions.csv").unlink()
    code = command.main(["run", str(world / "recipe.yaml"), f"output={world / 'run'}"])
    assert code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"aimv2-mllm: stage tune: {world}/photos/questions.csv: cannot be read")
    assert not (world / "run").exists()
