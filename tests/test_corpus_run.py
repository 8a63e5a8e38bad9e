"""A stage on a corpus of one's own, from shards to a result: interrupted, resumed, refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from corpora import write_shard, write_tar

from aimv2_mllm import __main__ as command
from aimv2_mllm.engine import metrics
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.model.weights import load_encoder
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.runs import run as runs

RECIPE = """\
name: corpus
stages:
  see:
    kind: pretrain
    encoder: {{size: aimv2_nano, image_size: 28}}
    decoder: {{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1,
              num_attention_heads: 2, max_text_tokens: 40}}
    tokenizer: tiny_llm
    data: {{seed: 1, sources: [{{kind: shards, urls: '{folder}/a-{{000..002}}.tar'}}]}}
    train: {{steps: 7, batch_size: 6, micro_batch_size: 3, lr: 1e-3, log_every: 1,
            checkpoint_every: 3}}
"""


class Killed(BaseException):
    """As a kill: nothing of ours may run any more after it."""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of three shards of 6 sheets each, with a recipe that trains on them."""
    # A kill loses nothing of what was written, only a power cut would.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for number in range(3):
        write_shard(tmp_path / f"a-{number:03}.tar", range(number * 6, number * 6 + 6), size=40)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def run(corpus: Path, output: str, *words: str) -> list[str]:
    said: list[str] = []
    overrides = [f"output={corpus / output}", *(f"stages.see.{word}" for word in words)]
    runs.run(load_recipe(corpus / "recipe.yaml", overrides), said.append)
    return said


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "see" / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in metrics.TIMED_FIELDS}
        for line in text
    ]


def files(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / "see" / "model" / "stage.json").read_text())["files"])


def die_in_step_5(monkeypatch: pytest.MonkeyPatch) -> None:
    close = metrics.Progress.close_line

    def dying(progress: metrics.Progress, *more: Any) -> Any:
        if progress.step == 5:
            raise Killed
        return close(progress, *more)

    monkeypatch.setattr(metrics.Progress, "close_line", dying)


def test_a_run_on_shards_is_the_same_with_workers_and_after_a_kill(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run(corpus, "whole")
    assert f"  18 rows, the first is {corpus}/a-000.tar, row 0" in said
    assert len(lines(corpus / "whole")) == 7
    assert load_encoder(corpus / "whole" / "see" / "model").config.image_size == 28
    run(corpus, "workers", "data.workers=2")
    die_in_step_5(monkeypatch)
    with pytest.raises(Killed):
        run(corpus, "killed", "data.workers=1")
    monkeypatch.undo()
    # Taken up with another number of workers: they decide nothing.
    assert "continuing from step 3" in run(corpus, "killed")
    for name in ("workers", "killed"):
        assert lines(corpus / name) == lines(corpus / "whole")
        assert files(corpus / name) == files(corpus / "whole")


def test_a_corpus_that_changed_does_not_go_on_from_the_old_ones_checkpoint(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_in_step_5(monkeypatch)
    with pytest.raises(Killed):
        run(corpus, "killed")
    monkeypatch.undo()
    write_shard(corpus / "a-001.tar", range(40, 47), size=40)
    with pytest.raises(UsageError, match="belongs to another run"):
        run(corpus, "killed")


def test_unusable_rows_are_in_the_metrics_and_too_many_end_the_run(corpus: Path) -> None:
    rows = {f"bad{i}.jpg": b"this is a letter" for i in range(3)}
    write_tar(corpus / "a-002.tar", rows | {f"bad{i}.txt": b"x" for i in range(3)})
    run(corpus, "few", "train.steps=4", "data.max_skipped=0.5")
    said = lines(corpus / "few")
    assert said[-1]["skipped_undecodable"] >= 3
    assert said[-1]["samples"] == 24
    longer = ("train.steps=60", "train.checkpoint_every=20", "train.log_every=60")
    with pytest.raises(RunFailed) as error:
        run(corpus, "many", *longer)
    message = str(error.value)
    assert "undecodable), more than the 5.0% that data.max_skipped allows, such as" in message
    assert "a-002.tar, row " in message
    assert "is not a picture" in message
    more = run(corpus, "many", *longer[:2], "train.log_every=25", "data.max_skipped=0.5")
    assert "continuing from step 20" in more


def test_a_missing_corpus_is_told_before_anything_is_trained(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "a-001.tar").unlink()
    code = command.main(["run", str(corpus / "recipe.yaml"), f"output={corpus / 'run'}"])
    assert code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"aimv2-mllm: stage see: {corpus}/a-001.tar: there is no such shard")
    assert not (corpus / "run").exists()


def test_a_model_of_another_corpus_gets_no_sheet(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(corpus, "run", "train.steps=1")
    code = command.main(["sample", str(corpus / "run"), str(corpus / "sheet.png")])
    assert code == 2
    assert "were trained on shards; sheets are for models trained on handwriting" in (
        capsys.readouterr().err
    )
