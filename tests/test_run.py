"""The run folder: taken up where it was left, to the bit; never mixed with another recipe."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_recipe
from safetensors.torch import load_file, save_file

from aimv2_mllm.engine.metrics import TIMED_FIELDS
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.model import hub
from aimv2_mllm.model.llms import TINY_LLM, load_llm, load_tokenizer, sizes_of
from aimv2_mllm.model.mllm import llava_config
from aimv2_mllm.place import Place
from aimv2_mllm.planning.problems import find_problems
from aimv2_mllm.recipe.schema import deciding, dump_recipe
from aimv2_mllm.runs import run as runs
from aimv2_mllm.runs import run_folder
from aimv2_mllm.stages.table import inputs

STAGES = ("pretrain", "align", "tune")


def metrics(folder: Path, stage: str) -> list[dict[str, object]]:
    lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED_FIELDS} for line in lines]


def record(folder: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((folder / stage / "model" / "stage.json").read_text()))


def files(folder: Path, stage: str) -> dict[str, str]:
    return dict(record(folder, stage)["files"])


def test_two_runs_of_a_recipe_are_equal_to_the_bit(tiny_run: Path, tmp_path: Path) -> None:
    again = runs.run(tiny_recipe(tmp_path / "again"), lambda _: None)
    for stage in STAGES:
        assert metrics(again, stage) == metrics(tiny_run, stage)
        assert len(metrics(again, stage)) == 3
        assert files(again, stage) == files(tiny_run, stage)
        assert record(again, stage)["fingerprint"] == record(tiny_run, stage)["fingerprint"]


def test_another_seed_is_another_run(tiny_run: Path, tmp_path: Path) -> None:
    other = runs.run(tiny_recipe(tmp_path / "other", "seed=1"), lambda _: None)
    assert metrics(other, "pretrain")[0]["text"] != metrics(tiny_run, "pretrain")[0]["text"]


def test_stages_of_a_kind_begin_with_equal_weights(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", "stages.pretrain.train.steps=1")
    both = recipe.stages["pretrain"]
    pictures = both.model_copy(update={"text_weight": 0})
    stages = {"both": both, "pictures": pictures}
    folder = runs.run(recipe.model_copy(update={"stages": stages}), lambda _: None)
    first, second = (metrics(folder, stage)[0]["image"] for stage in stages)
    assert first == second


def test_steps_of_different_sizes_leave_no_holes_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for name in ("keep_freed", "map_large"):
        monkeypatch.setattr(runs.heap, name, lambda name=name: told.append(name))
    steps = [f"stages.{stage}.train.steps=1" for stage in STAGES]
    runs.run(tiny_recipe(tmp_path / "run", *steps), lambda _: None)
    assert told == ["keep_freed", "map_large", "map_large"]


@pytest.mark.slow
def test_killed_in_every_stage_and_run_again_ends_with_equal_metrics(tmp_path: Path) -> None:
    folder, file = tmp_path / "killed", tmp_path / "recipe.yaml"
    longer = [f"stages.{stage}.train.steps=30" for stage in STAGES]
    file.write_text(dump_recipe(tiny_recipe(folder, *longer)))
    command = [sys.executable, "-m", "aimv2_mllm", "run", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    whole = folder.rename(tmp_path / "whole")
    said = ""
    for number, code, stage in (
        (signal.SIGKILL, -9, "pretrain"),
        (signal.SIGTERM, 143, "align"),
        (signal.SIGINT, 130, "tune"),
    ):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while not list(folder.glob(f"{stage}/checkpoints/step-??????")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        process.send_signal(number)
        said += process.communicate(timeout=60)[0]
        assert process.returncode == code, said
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (said + ended.stderr).count("continuing from step") == 3
    for stage in STAGES:
        assert metrics(folder, stage) == metrics(whole, stage)
        assert len(metrics(folder, stage)) == 30
        assert files(folder, stage) == files(whole, stage)


def test_a_finished_stage_is_not_run_twice(tiny_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}
    said: list[str] = []
    runs.run(tiny_recipe(tiny_run), said.append)
    after = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*") if path.is_file()}
    before.pop(tiny_run / ".lock")
    after.pop(tiny_run / ".lock")
    assert after == before
    assert [line for line in said if "finished" in line and line.startswith("stage")] == said


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda model: (model / "model.safetensors").write_bytes(b"x"), "not as the stage wrote"),
        (lambda model: (model / "config.json").unlink(), "not as the stage wrote"),
        (lambda model: (model / "stage.json").write_text("{}"), "is not a stage's record"),
    ],
)
def test_a_finished_stage_that_was_spoilt_is_refused(
    tiny_run: Path, tmp_path: Path, spoil: Any, why: str
) -> None:
    folder = shutil.copytree(tiny_run, tmp_path / "copy")
    spoil(folder / "align" / "model")
    with pytest.raises(UsageError, match=f"{why}.*remove {folder / 'align'}"):
        runs.run(tiny_recipe(folder), lambda _: None)


def test_a_stage_made_from_another_llm_is_refused(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_digest", lambda *_: "another")
    with pytest.raises(UsageError, match="made from another LLM, tower or stage"):
        runs.run(tiny_recipe(tiny_run), lambda _: None)


def test_a_run_as_tower_counts_by_its_encoder_and_not_by_its_report(
    tiny_run: Path, tmp_path: Path
) -> None:
    tower = shutil.copytree(tiny_run, tmp_path / "tower")
    recipe = tiny_recipe(tmp_path / "run", f"stages.align.tower={tower}")
    recipe = recipe.model_copy(update={"stages": {"align": recipe.stages["align"]}})
    assert find_problems(Place(recipe, recipe.output), 1) == []
    runs.run(recipe, lambda _: None)
    assert record(tmp_path / "run", "align")["licence"] == "Apache-2.0"
    assert files(tmp_path / "run", "align") == files(tiny_run, "align")
    (tower / "report.md").write_text("judged again")
    said: list[str] = []
    runs.run(recipe, said.append)
    assert [line.split(",")[0] for line in said] == ["stage align: finished"]
    weights = load_file(tower / "pretrain" / "model" / "model.safetensors")
    next(iter(weights.values())).add_(1)
    save_file(weights, tower / "pretrain" / "model" / "model.safetensors")
    with pytest.raises(UsageError, match="made from another LLM, tower or stage"):
        runs.run(recipe, lambda _: None)


def test_a_stage_is_made_from_those_alone_that_it_names(tiny_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    recipe = tiny_recipe(folder)
    stages = {"pretrain": recipe.stages["pretrain"], "aside": recipe.stages["pretrain"]}
    place = Place(recipe.model_copy(update={"stages": {**stages, **recipe.stages}}), folder)
    aside = {"files": {"model.safetensors": "another"}, "licence": "apple-amlr", "origins": []}
    (folder / "aside" / "model").mkdir(parents=True)
    (folder / "aside" / "model" / "stage.json").write_text(json.dumps(aside))
    for name in ("align", "tune"):
        assert list(place.recipe.stages).index(name) > 1
        assert run_folder.to_train(name, place) is None
        assert run_folder.lineage(name, place)["licence"] == "Apache-2.0"


def as_once(name: str, place: Place) -> str:
    """The fingerprint as it was taken of all stages before, with when a stage is told of too."""
    stage, before = place.recipe.stages[name], []
    for other in place.recipe.stages:
        if other == name:
            break
        before.append(place.record(other)["files"])
    own = deciding(stage.model_dump(mode="json"))
    own["train"]["log_every"], own["data"]["max_skipped"] = stage.train.log_every, 0.05
    named = inputs(stage, place).items()
    outside = [run_folder._digest(one, run_folder._folder(key, one)) for key, one in named]
    text = json.dumps([name, place.recipe.seed, own, before, outside], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_what_was_made_when_more_counted_is_known_again(tiny_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    place = Place(tiny_recipe(folder), folder)
    for name in STAGES:
        made = {**record(folder, name), "fingerprint": as_once(name, place)}
        assert made["fingerprint"] != record(folder, name)["fingerprint"]
        (folder / name / "model" / "stage.json").write_text(json.dumps(made))
    others = [f"stages.{name}.{key}" for name in STAGES for key in ("train.log_every=7",
              "data.max_skipped=0.5")]  # fmt: skip
    said: list[str] = []
    runs.run(tiny_recipe(folder, *others), said.append)
    assert [line.split(",")[0] for line in said] == [f"stage {name}: finished" for name in STAGES]
    # A checkpoint does not say more of its recipe than this.
    shutil.rmtree(folder / "tune" / "model")
    for path in folder.glob("tune/checkpoints/step-*/state.json"):
        state = json.loads(path.read_text())
        state["fingerprint"] = as_once("tune", place) + state["fingerprint"][16:]
        path.write_text(json.dumps(state))
    runs.run(tiny_recipe(folder), said.append)
    assert "continuing from step 3" in said
    assert files(folder, "tune") == files(tiny_run, "tune")


def test_an_llm_of_the_hub_is_told_by_commit_and_licence_and_stays_the_same_in_a_run(
    tiny_run: Path, tmp_path: Path, publish: Callable[..., Path]
) -> None:
    first, second = "a" * 40, "b" * 40
    recipe = tiny_recipe(tmp_path / "run", "stages.align.llm=org/llm")

    def run_anew() -> list[str]:
        said: list[str] = []
        hub.COMMITS.clear()  # as in a process of its own
        runs.run(recipe, said.append)
        return said

    folder = publish(TINY_LLM, "org/llm", first)
    (folder / "README.md").write_text("---\nlicense: llama3\n---\n")
    run_anew()
    for stage in ("align", "tune"):
        theirs = files(tiny_run, stage).items()
        changed = {name for name, _ in files(tmp_path / "run", stage).items() ^ theirs}
        assert changed <= {"tokenizer_config.json"}  # transformers' `is_local`
        told = record(tmp_path / "run", stage)
        assert {"source": "org/llm", "revision": first, "licence": "llama3"} in told["origins"]
        assert told["licence"] == "Apache-2.0 and llama3"
    publish(TINY_LLM, "org/llm", second)
    finished = [f"stage {name}: finished" for name in STAGES]
    assert [line.split(",")[0] for line in run_anew()] == finished
    (tmp_path / "run" / "hub.json").write_text("[")
    with pytest.raises(UsageError, match="is not a run's list of commits"):
        run_anew()
    (tmp_path / "run" / "hub.json").unlink()
    with pytest.raises(UsageError, match="made from another LLM, tower or stage"):
        run_anew()


@pytest.mark.parametrize("load", [load_tokenizer, load_llm, sizes_of, llava_config])
def test_a_revision_of_a_hub_model_is_the_one_that_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    publish: Callable[..., Path],
    load: Callable[[str], Any],
) -> None:
    asked: list[Any] = []

    def snapshot(repository: str, **words: Any) -> str:
        asked.append((repository, words["revision"], words["allow_patterns"]))
        return str(tmp_path / "snapshots" / ("c" * 40))

    def from_pretrained(name: str, **words: Any) -> None:
        asked.append((name, words["revision"]))
        raise OSError("enough")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for kind in ("AutoTokenizer", "AutoModelForCausalLM", "AutoConfig"):
        monkeypatch.setattr(f"transformers.{kind}.from_pretrained", from_pretrained)
    with pytest.raises(UsageError, match="enough"):
        load("org/other@v2")
    assert asked == [("org/other", "v2", hub.FACTS), ("org/other", "c" * 40)]


def test_a_result_tells_where_it_comes_from_and_nothing_of_this_machine(tiny_run: Path) -> None:
    assert record(tiny_run, "align")["parents"] == ["tiny_llm", "pretrain"]
    assert record(tiny_run, "tune")["licence"] == "Apache-2.0"
    for file in tiny_run.rglob("*.json"):
        text = file.read_text()
        assert str(tiny_run) not in text, file
        assert str(Path(runs.__file__).parent) not in text, file


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("stages.tune.lora.targets=[q_proj, v_porj]", "no v_porj; .* did you mean v_proj?"),
        ("stages.align.llm=./nowhere", "stage align: ./nowhere"),
        ("stages.align.tower=./nowhere", "stage align: ./nowhere"),
        ("stages.pretrain.tokenizer=./nowhere", "stage pretrain: ./nowhere"),
    ],
)
def test_what_a_late_stage_lacks_is_said_before_the_first_is_trained(
    tmp_path: Path, word: str, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        runs.run(tiny_recipe(tmp_path / "run", word), lambda _: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "- a list", "name: [", "\0"])
def test_a_run_folder_with_an_unreadable_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError, match="is not a run's recipe"):
        runs.run(tiny_recipe(tmp_path), lambda _: None)


def test_a_changed_recipe_is_refused_and_the_changed_keys_are_named(tiny_run: Path) -> None:
    changed = tiny_recipe(tiny_run, "stages.tune.train.lr=0.5", "seed=3")
    with pytest.raises(UsageError) as error:
        runs.run(changed, lambda _: None)
    assert "stages.tune.train.lr: 0.002 -> 0.5" in str(error.value)
    assert "seed: 0 -> 3" in str(error.value)


def test_a_run_goes_on_when_only_how_it_is_executed_has_changed(
    tiny_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_run, tmp_path / "copy")
    changed = tiny_recipe(
        folder, "stages.tune.train.strategy=fsdp2", "stages.align.train.device=cpu"
    )
    said: list[str] = []
    runs.run(changed, said.append)
    assert [line.split(",")[0] for line in said] == [f"stage {name}: finished" for name in STAGES]
    assert (folder / "recipe.yaml").read_text() == dump_recipe(changed)


def test_a_tracker_that_is_not_installed_is_missed_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb is not installed: pip install wandb"):
        runs.run(
            tiny_recipe(tmp_path / "run", "stages.tune.train.trackers=[wandb]"), lambda _: None
        )
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with (
        run_folder.locked(tmp_path),
        pytest.raises(UsageError, match="another process"),
        run_folder.locked(tmp_path),
    ):
        pass


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be the folder of results"):
        runs.run(tiny_recipe(tmp_path / "file" / "run"), lambda _: None)


def test_a_result_that_cannot_be_written_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "sha256", full)
        with pytest.raises(RunFailed, match="No space left"):
            runs.run(tiny_recipe(tmp_path / "run"), lambda _: None)
    assert not list((tmp_path / "run" / "pretrain").glob("*model*"))
    assert (tmp_path / "run" / "pretrain" / "checkpoints" / "latest").is_file()
    said: list[str] = []
    runs.run(tiny_recipe(tmp_path / "run"), said.append)
    assert "continuing from step 3" in said
