"""Stages with kept features: nobody can tell the difference in what is trained, whatever happens to
the features or the run."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from test_distributed import ended, started
from test_talks import batches_of, llava_row, sheet, written

from aimv2_mllm.data import files
from aimv2_mllm.data.features.store import GIB, FeatureStore
from aimv2_mllm.data.pairs.batches import Share
from aimv2_mllm.engine import metrics
from aimv2_mllm.engine.distributed import Ranks
from aimv2_mllm.engine.flops import FlopCounter
from aimv2_mllm.engine.training import Training
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.encoder import AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.frozen_tower import FrozenTower
from aimv2_mllm.model.mllm import load_llava
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.weights import save_encoder
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.recipe.stages import LanguageStage
from aimv2_mllm.runs import run as runs
from aimv2_mllm.stages import feature_pass

PICTURES = 6
RECIPE = """\
name: kept
output: {folder}/run
stages:
  align:
    kind: align
    tower: {folder}/tower
    llm: tiny_llm
    data:
      template: plain
      sources: [{{kind: llava, file: {folder}/captions.jsonl}}]
      features: {{folder: {folder}/cache}}
    train: {{steps: 6, batch_size: 4, micro_batch_size: 2, lr: 1e-3, log_every: 1,
            checkpoint_every: 2, device: cpu}}
  tune:
    kind: tune
    start: align
    data:
      sources: [{{kind: llava, file: {folder}/rows.jsonl}}]
      features: {{folder: {folder}/cache}}
    train: {{steps: 4, batch_size: 4, micro_batch_size: 2, lr: 1e-3, log_every: 1,
            checkpoint_every: 2, device: cpu}}
"""
STAGES = ("align", "tune")
Change = Callable[[], None]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tower, pictures, conversations, a recipe, and the results `run` of it."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    save_encoder(AIMv2Encoder(EncoderConfig(16, 24, 2, 2, image_size=28)), folder / "tower")
    Preprocessing(28).save(folder / "tower")
    for number in range(PICTURES):
        content, caption = sheet(number, 40)
        (folder / f"{number}.jpg").write_bytes(content)
        row = llava_row("Say.\n<image>", caption, image=f"{number}.jpg")
        with (folder / "captions.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    rows = [
        llava_row("<image>\nRed?", "no", "Blue?", "yes", image="0.jpg"),
        llava_row("Say a digit.", "7"),
        llava_row("Say a colour.", "red"),
        llava_row("<image> or <image>?", "the first", image=["1.jpg", "2.jpg"]),
        llava_row("<image>\nRed?", "a", image="broken.jpg"),
        llava_row("<image>\nRed?", "yes", image="5.jpg"),
    ]
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    run(folder, "run")
    return folder


def run(folder: Path, output: str, *words: str, cache: str = "cache") -> list[str]:
    said: list[str] = []
    kept = [f"stages.{stage}.data.features.folder={folder / cache}" for stage in STAGES]
    recipe = load_recipe(folder / "recipe.yaml", [f"output={folder / output}", *kept, *words])
    runs.run(recipe, said.append)
    return said


def results(folder: Path, stages: tuple[str, ...] = STAGES) -> dict[str, Any]:
    """The metrics of stages without their timings, and the digests of their files."""
    found = {}
    for stage in stages:
        lines = map(json.loads, (folder / stage / "metrics.jsonl").read_text().splitlines())
        kept = [{k: v for k, v in x.items() if k not in metrics.TIMED_FIELDS} for x in lines]
        found[stage] = kept, record(folder, stage)["files"]
    return found


def record(folder: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((folder / stage / "model" / "stage.json").read_text()))


def in_a_process(folder: Path, output: str, change: Change, *words: str) -> int | None:
    """How a run ends that is begun, or gone on with, in a process in which `change` was made."""

    def task() -> None:
        change()
        run(folder, output, *words, cache=f"cache-of-{output}")

    process = multiprocessing.get_context("fork").Process(target=task)
    process.start()
    process.join(120)
    return process.exitcode


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in_the_pass() -> None:
    """After the second shard, of one picture each."""
    add, count = FeatureStore.add, [0]

    def counted(self: FeatureStore, *words: Any, **more: Any) -> bool:
        count[0] += 1
        return add(self, *words, **more) if count[0] <= 2 else bool(die())

    feature_pass.SHARD_BYTES = feature_pass.ROWS = 1
    FeatureStore.add = counted  # type: ignore[method-assign]


def dies_in_step_4() -> None:
    gradients, count = Training.gradients, [0]

    def counted(self: Training, *words: Any) -> Any:
        count[0] += 1
        return gradients(self, *words) if count[0] < 4 else die()

    Training.gradients = counted  # type: ignore[method-assign]


def no_tower() -> None:
    """From now on a tower that is looked through ends the process."""
    FrozenTower.read = die  # type: ignore[assignment,method-assign]


def test_what_is_learned_is_what_is_learned_without(world: Path) -> None:
    run(world, "without", *(f"stages.{stage}.data.features=null" for stage in STAGES))
    without, kept = results(world / "without"), results(world / "run")
    for stage in STAGES:
        assert len(kept[stage][0]) >= 4
        for line, other in zip(kept[stage][0], without[stage][0], strict=True):
            assert line == pytest.approx(other, rel=1e-4)


def test_the_record_tells_what_was_kept_and_read(world: Path) -> None:
    align, tune = (record(world / "run", stage)["features"] for stage in STAGES)
    assert align.pop("gib") == tune.pop("gib") > 0
    assert align.pop("of") != tune.pop("of")  # which pictures
    assert tune.pop("took")["flops"] == pytest.approx(5 / 7 * align.pop("took")["flops"], rel=1e-5)
    # Each picture once, and the blank one; a row of tune names what is no picture.
    facts = {"pictures": PICTURES + 1, "kept": PICTURES + 1, "whole": True}
    assert align == {**facts, "read": 24, "computed": 0}
    assert tune.pop("read") > 0
    assert tune == {"pictures": 5, "kept": 5, "whole": True, "computed": 0}
    parts = [row[0] for row in record(world / "run", "align")["parts"]]
    assert "tower" in parts


def test_the_record_tells_what_a_look_through_the_pictures_takes_whoever_took_it(
    world: Path,
) -> None:
    run(world, "first", cache="took-cache")
    run(world, "second", "stages.align.connector=linear", cache="took-cache")
    first, second = (record(world / name, "align")["features"] for name in ("first", "second"))
    assert first["took"] == second["took"]
    assert first["of"] == second["of"]
    assert first["took"]["seconds"] > 0
    llava, _ = load_llava(str(world / "first" / "align" / "model"), "auto")
    tower = FrozenTower(llava.model, torch.float32)
    with FlopCounter() as counter:
        tower.read(torch.zeros(1, 3, 28, 28))
    assert first["took"]["flops"] == pytest.approx((PICTURES + 1) * counter.flops, rel=1e-5)


def test_the_tower_is_not_looked_through_again_by_whatever_reads_its_features(world: Path) -> None:
    (world / "cache-of-other").symlink_to(world / "cache")
    words = ["stages.align.connector=linear", "stages.tune.data.workers=2"]
    assert in_a_process(world, "other", no_tower, *words, "seed=3") == 0
    assert in_a_process(world, "fresh", no_tower) == -signal.SIGKILL


def test_killed_in_the_pass_and_in_training_it_ends_as_undisturbed(world: Path) -> None:
    assert in_a_process(world, "killed", dies_in_the_pass) == -signal.SIGKILL
    assert len(list((world / "cache-of-killed").glob("*/*.safetensors"))) == 2
    words = "stages.align.data.workers=2"
    assert in_a_process(world, "killed", dies_in_step_4, words) == -signal.SIGKILL
    assert (world / "killed" / "align" / "checkpoints" / "latest").exists()
    said = run(world, "killed", cache="cache-of-killed")
    assert "continuing from step 2" in said
    assert results(world / "killed") == results(world / "run")


def test_what_does_not_fit_is_computed_and_makes_no_difference(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_pass, "SHARD_BYTES", 1)
    monkeypatch.setattr(feature_pass, "ROWS", 1)
    words = [f"stages.{stage}.data.features.max_gib={2000 / GIB}" for stage in STAGES]
    said = run(world, "small", *words, cache="small-cache")
    assert any("max_gib is full" in line for line in said)
    taken = sum(f.stat().st_size for f in (world / "small-cache").glob("*/*.safetensors"))
    assert 0 < taken <= 2000
    told = record(world / "small", "align")["features"]
    assert told["read"] > 0
    assert told["computed"] > 0
    assert results(world / "small") == results(world / "run")
    # Each picture that training computes is counted in its step.
    each = told["took"]["flops"] / told["kept"]
    small, whole = (record(world / name, "align")["last"]["flops"] for name in ("small", "run"))
    more = small - whole
    assert more == pytest.approx(told["computed"] * each, rel=0.02)  # of rounded numbers


def test_what_was_damaged_is_told_and_computed_again(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_pass, "SHARD_BYTES", 1)
    monkeypatch.setattr(feature_pass, "ROWS", 1)
    run(world, "damaged", cache="damaged-cache")
    first, second, *_ = sorted((world / "damaged-cache").glob("*/*.safetensors"))
    first.write_bytes(first.read_bytes()[:-3])
    second.write_bytes(second.read_bytes()[:-3] + b"abc")  # of the right length
    said = run(world, "again", cache="damaged-cache")
    assert [line for line in said if line.startswith(f"{first}: removed")] != []
    assert results(world / "again") == results(world / "run")
    assert not second.exists() or second.read_bytes()[-3:] != b"abc"


def test_ranks_share_what_they_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_pass, "ROWS", 2)
    rows = [llava_row("<image>\nRed?", "yes", image=f"{n % 4}.jpg") for n in range(11)]
    source, read, content = written(tmp_path, rows), list[Path](), files.read_whole

    def counted(path: Path, most: int) -> bytes:
        read.append(path)
        return content(path, most)

    monkeypatch.setattr(files, "read_whole", counted)
    keys = list[set[bytes]]()
    for size in (1, 2, 3, 8):
        read.clear()
        for rank in range(size):
            store = FeatureStore(tmp_path / "cache", "tower", 1.0)
            work = feature_pass.Pass(batches_of(source, share=Share(rank, size)), store, 11)
            made = [batch for number in range(work.num_chunks) for batch in work(number)]
            keys.append({key for batch in made for key in batch["all"]})
        assert len(read) == 11
        assert len(set().union(*keys[-size:])) == 4 + 1


def align_on_ranks(folder: Path, ranks: Ranks, strategy: str) -> None:
    """The align stage as one of several ranks."""
    kept = f"stages.align.data.features.folder={folder / 'cache-of'}-{strategy}"
    words = [f"output={folder / strategy}", kept, f"stages.align.train.strategy={strategy}"]
    recipe = load_recipe(folder / "recipe.yaml", words)
    place = runs.Place(recipe, recipe.output, runs.Share(ranks.rank, ranks.size))
    runs.run_stage("align", recipe.stages["align"], place, lambda text: None, ranks)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_share_the_pass_and_learn_what_one_does(world: Path, strategy: str) -> None:
    launched = started(2, world, align_on_ranks, strategy=strategy)
    assert ended(launched) == [0, 0]
    two, one = (results(world / name, ("align",))["align"][0] for name in (strategy, "run"))
    for line, other in zip(two, one, strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    told = record(world / strategy, "align")["features"]
    assert told["pictures"] == told["kept"] == PICTURES + 1
    assert told["read"] == 24


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["align.data.sources=[{kind: handwriting}]"], "null with a source of handwriting: its"),
        (["align.data.features.max_gib=0"], "max_gib: is 0"),
        (["align.data.features={max_gib: 3}"], "stages.align.data.features.folder"),
        (["tune.tower_blocks=1"], "no features where tower_blocks are trained: they change"),
    ],
)
def test_features_that_have_no_end_or_change_are_refused(
    world: Path, words: list[str], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        load_recipe(world / "recipe.yaml", [f"stages.{word}" for word in words])


def test_a_language_model_has_no_features() -> None:
    with pytest.raises(ValidationError, match="a language stage has no tower"):
        LanguageStage.model_validate(
            {
                "model": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                          "num_attention_heads": 2, "num_key_value_heads": 2,
                          "max_position_embeddings": 9},
                "vocab_size": 99,
                "data": {"sources": [{"kind": "llava", "file": "x"}], "features": {"folder": "f"}},
                "train": {"steps": 1, "batch_size": 1, "lr": 1.0},
            }
        )  # fmt: skip
