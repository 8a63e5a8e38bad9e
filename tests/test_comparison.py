"""A recipe in variants: which runs there are, what becomes of them, what they are worth."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aimv2_mllm.__main__ import main
from aimv2_mllm.comparison import page
from aimv2_mllm.comparison.grid import Grid, grid_of
from aimv2_mllm.comparison.numbers import numbers_of
from aimv2_mllm.comparison.running import LOG, do_all
from aimv2_mllm.comparison.tasks import Task, answers_in, tasks_of
from aimv2_mllm.errors import UsageError
from aimv2_mllm.folders import STAGE_FILE

RECIPE = str(Path(__file__).parents[1] / "recipes" / "compare_towers.yaml")
ASKED = "0123456789abcdef"
SHUFFLE = "{name: pixel_shuffle, factor: 2}"


def grid(out: Path, *varied: str, seeds: int = 1, overrides: tuple[str, ...] = ()) -> Grid:
    return grid_of(RECIPE, overrides, varied, seeds, out)


def test_every_combination_is_a_run_for_every_seed(tmp_path: Path) -> None:
    made = grid(tmp_path, "tower=captions,both", f"connector=mlp,{SHUFFLE}", seeds=2)
    assert [(made.named(cell.values), cell.seed) for cell in made.cells] == [
        (f"{tower}, {connector}", seed)
        for seed in (0, 1)
        for tower in ("captions", "both")
        for connector in ("mlp", "pixel_shuffle 2")
    ]
    assert len({cell.folder for cell in made.cells}) == 8
    connectors = {cell.recipe.stages["align"].connector.name for cell in made.cells}  # type: ignore[union-attr]
    assert connectors == {"mlp", "pixel_shuffle"}


def test_what_the_runs_have_in_common_is_trained_once_for_a_seed(tmp_path: Path) -> None:
    made = grid(tmp_path, "tower=captions,both", seeds=2)
    for seed, recipe in made.shared.items():
        assert recipe is not None
        assert recipe.seed == seed
        assert list(recipe.stages) == ["untrained", "image_only", "captions", "both"]
    for cell in made.cells:
        assert list(cell.recipe.stages) == ["align", "tune"]
        common = made.shared[cell.seed]
        assert common is not None
        tower = common.output.absolute() / cell.values[0] / "model"
        assert cell.recipe.stages["align"].tower == str(tower)  # type: ignore[union-attr]


def test_where_only_the_last_stage_varies_the_one_before_it_is_common_too(tmp_path: Path) -> None:
    [cell, _] = grid(tmp_path, "stages.tune.lora.r=4,8").cells
    assert list(cell.recipe.stages) == ["tune"]
    assert cell.recipe.stages["tune"].start == str(  # type: ignore[union-attr]
        tmp_path / "shared" / "seed-0" / "align" / "model"
    )


def test_where_the_first_stage_varies_nothing_is_common(tmp_path: Path) -> None:
    made = grid(tmp_path, "stages.untrained.encoder.image_size=56,112")
    assert made.shared == {0: None}
    assert [len(cell.recipe.stages) for cell in made.cells] == [6, 6]


def test_a_tower_is_resized_once_for_every_size(tmp_path: Path) -> None:
    made = grid(tmp_path, "image_size=56,112", "connector=linear,mlp")
    tasks = tasks_of(made, ["python"], ["handwriting"], ASKED)
    resized = [task for task in tasks if task.name.startswith("tower")]
    assert len(resized) == 2
    for cell in made.cells:
        assert cell.resized is not None
        assert cell.recipe.stages["align"].tower == str(cell.resized.folder)  # type: ignore[union-attr]
    [last] = resized[-1].commands
    assert last[-2:] == ("--image-size", "112")
    assert resized[-1].after == (tmp_path / "shared" / "seed-0-log",)


def test_features_are_kept_where_pictures_have_an_end(tmp_path: Path) -> None:
    photos = 'stages.align.data.sources=[{kind: questions, folder: "photos"}]'
    made = grid(tmp_path, "connector=linear,mlp", overrides=(photos,))
    align, tune = (made.cells[0].recipe.stages[name].data for name in ("align", "tune"))
    assert align.features.folder == str(tmp_path / "features")  # type: ignore[union-attr]
    assert tune.features is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("varied", "said"),
    [
        ("tower", "is written KEY=VALUE"),
        ("tower=", "is written KEY=VALUE"),
        ("tower=both,", "is written KEY=VALUE"),
        ("tower=both,both", "has a value twice"),
        ("towr=both", "did you mean tower?"),
        ("seed=1,2", "--seeds N repeats every run"),
        ("image_size=big", "big is no number of pixels"),
        ("image_size=0", "0 is no number of pixels"),
        ("connector={name: mlp", "is no value as a recipe has it"),
        ("tower=@x", "is no value as a recipe has it"),
        ("connector=mlp,{name: mlp}", "are the same run"),
        ("stages.tune.train.lr=1e-3,0.001", "are the same run"),
        ("tower=both,booth", "did you mean both?"),
        ("stages.tune.lora.rank=1,2", "unknown key"),
    ],
)
def test_what_cannot_vary_is_refused_before_anything_runs(
    varied: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        grid(tmp_path, varied)
    assert not list(tmp_path.iterdir())


def test_a_tower_that_is_not_there_is_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", RECIPE, "--vary", "tower=both,./nowhere", "--out", str(tmp_path / "out")]
    assert main([*words, "--limit", "14"]) == 2
    assert "stages.align.tower: there is no folder ./nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_comma_inside_quotes_belongs_to_the_value(tmp_path: Path) -> None:
    made = grid(tmp_path, 'tower="./my, folder",./other')
    assert made.axes[0].values == ('"./my, folder"', "./other")
    assert made.cells[0].recipe.stages["align"].tower == "./my, folder"  # type: ignore[union-attr]


def test_what_ends_without_a_model_that_talks_is_refused(tmp_path: Path) -> None:
    recipe = str(Path(RECIPE).with_name("ablation.yaml"))
    with pytest.raises(UsageError, match="ends with a pretrain stage"):
        grid_of(recipe, (), ("stages.both.train.lr=1e-3,2e-3",), 1, tmp_path)


def task(folder: Path, code: str, *after: Path) -> Task:
    return Task(folder.name, folder, ((sys.executable, "-c", code),), after=after)


def test_a_failed_run_is_told_in_its_own_last_words_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    tasks = [
        task(tmp_path / "bad", "import sys; print('aimv2-mllm: no room'); sys.exit(2)"),
        task(tmp_path / "behind", "print(1)", tmp_path / "bad"),
        task(tmp_path / "good", "print('fine')"),
    ]
    failed = do_all(tasks, 1, said.append)
    assert failed.keys() == {tmp_path / "bad", tmp_path / "behind"}
    assert failed[tmp_path / "bad"].startswith("no room (see ")
    assert "fine" in (tmp_path / "good" / LOG).read_text()
    assert not (tmp_path / "behind").exists()
    assert [line.split(":")[0] for line in said] == ["bad", "good"]


def test_a_run_that_was_killed_is_said_to_be(tmp_path: Path) -> None:
    bad = task(tmp_path / "bad", "import os; print('aimv2-mllm: step 3'); os.kill(os.getpid(), 9)")
    failed = do_all([bad], 1, lambda _: None)
    assert failed[bad.folder].startswith("ended by SIGKILL, as where memory is short")


def test_why_a_run_failed_is_what_its_last_command_said(tmp_path: Path) -> None:
    codes = ("print('aimv2-mllm: an old line')", "print('the last words'); raise SystemExit(3)")
    commands = tuple((sys.executable, "-c", code) for code in codes)
    [why] = do_all([Task("two", tmp_path / "two", commands)], 1, lambda _: None).values()
    assert why.startswith("the last words (see")


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    good, bad = task(tmp_path / "good", code), task(tmp_path / "bad", f"{code}; 1 / 0")
    for _ in range(2):
        assert do_all([good, bad], 2, lambda _: None).keys() == {tmp_path / "bad"}
    assert (tmp_path / "count").read_text() == "xxx"
    assert not task(tmp_path / "good", "print('other')").is_done()


def test_two_at_a_time_run_beside_each_other_each_on_its_share(tmp_path: Path) -> None:
    # Each waits until the other has begun.
    code = (
        "import os, pathlib, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / f'begun-{sys.argv[1]}').touch()\n"
        "while len(list(here.glob('begun-*'))) < 2: time.sleep(0.02)\n"
        "print('threads', os.environ['OMP_NUM_THREADS'])\n"
    )
    tasks = [
        Task(name, tmp_path / name, ((sys.executable, "-c", code, name),)) for name in ("a", "b")
    ]
    assert not do_all(tasks, 2, lambda _: None)
    assert "threads " in (tmp_path / "a" / LOG).read_text()


def test_an_interrupted_comparison_ends_what_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    code = (
        "import pathlib, signal, sys, time\n"
        f"def end(*_): pathlib.Path({str(ended)!r}).touch(); sys.exit(143)\n"
        f"signal.signal(signal.SIGTERM, end)\npathlib.Path({str(begun)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        if begun.exists():
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr("aimv2_mllm.comparison.running.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        do_all([task(tmp_path / "long", code)], 1, lambda _: None)
    assert ended.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that")
def test_what_runs_ends_also_when_the_comparison_is_killed(tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    inner = (
        "import pathlib, signal, sys, time\n"
        f"def end(*_): pathlib.Path({str(ended)!r}).touch(); sys.exit(143)\n"
        f"signal.signal(signal.SIGTERM, end)\npathlib.Path({str(begun)!r}).touch()\n"
        "time.sleep(60)\n"
    )
    outer = (
        "import pathlib, sys\n"
        "from aimv2_mllm.comparison.running import do_all\n"
        "from aimv2_mllm.comparison.tasks import Task\n"
        f"folder = pathlib.Path({str(tmp_path / 'task')!r})\n"
        f"do_all([Task('a', folder, ((sys.executable, '-c', {inner!r}),))], 1, print)\n"
    )
    with subprocess.Popen([sys.executable, "-c", outer]) as comparison:
        wait_for(begun)
        comparison.kill()
    wait_for(ended)


def wait_for(file: Path) -> None:
    until = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < until, file
        time.sleep(0.05)


def finished(made: Grid, scores: dict[tuple[str, ...], list[float]]) -> dict[Path, str]:
    """Write what the runs of `made` would leave behind: the same scores for every seed, raised by a
    question for the second; those that have none failed, and why."""
    failed = {}
    for cell in made.cells:
        if cell.values not in scores:
            failed[cell.folder] = "no room"
            continue
        for name in cell.recipe.stages:
            record = {
                "parts": [["tower", 1000, False], ["connector", 10, True]],
                "seconds": 2.0,
                "last": {"memory_gib": 0.5, "samples": 8, "tokens": 40, "flops": 3e12},
            }
            folder = cell.recipe.output / name / "model"
            folder.mkdir(parents=True)
            (folder / STAGE_FILE).write_text(json.dumps(record))
        answers_in(cell, ASKED).mkdir()
        lines = [
            {
                "id": str(n),
                "seen": {"score": score},
                "blind": {"score": 0},
                "text_only": {"score": 1},
            }
            for n, score in enumerate(scores[cell.values])
        ]
        (answers_in(cell, ASKED) / "results.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    return failed


def compared(tmp_path: Path, scores: dict[tuple[str, ...], list[float]]) -> dict[str, Any]:
    made = grid(tmp_path, "tower=captions,both", "connector=linear,mlp", seeds=2)
    failed = finished(made, scores)
    speed = {values: {"image_tokens": 16, "first_token_ms": 5.0} for values in scores}
    more = {"recipe": RECIPE, "data": "handwriting", "metric": "exact", "jobs": 1, "command": "x"}
    return numbers_of(made, failed, speed, ASKED) | more | {"versions": {"torch": "2"}}


SCORES = {
    ("captions", "linear"): [1.0, 0.0, 0.0, 0.0],
    ("captions", "mlp"): [1.0, 1.0, 0.0, 0.0],
    ("both", "linear"): [1.0, 1.0, 1.0, 0.0],
    ("both", "mlp"): [1.0, 1.0, 1.0, 1.0],
}


def test_scores_are_means_over_seeds_and_effects_over_the_other_axes(tmp_path: Path) -> None:
    numbers = compared(tmp_path, SCORES)
    assert [group["score"] for group in numbers["groups"]] == [0.25, 0.5, 0.75, 1.0]
    assert all(len(group["runs"]) == 2 for group in numbers["groups"])
    effects = {(e["axis"], e["value"]): e for e in numbers["effects"]}
    assert effects["tower", "captions"]["score"] == 0.375
    assert effects["tower", "captions"]["behind"] == 0.5
    assert effects["tower", "both"]["behind"] == 0
    assert effects["connector", "linear"]["behind"] == 0.25
    low, high = effects["tower", "captions"]["behind_interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert numbers["groups"][0]["controls"] == {"text_only": 1, "blind": 0}
    # Of the align and the tune stage together.
    assert numbers["groups"][0]["train_tflop"] == 6
    assert numbers["groups"][0]["samples"] == 16


def test_effects_leave_out_what_failed_for_another_value(tmp_path: Path) -> None:
    left = {values: found for values, found in SCORES.items() if values != ("captions", "mlp")}
    numbers = compared(tmp_path, left)
    effects = {(e["axis"], e["value"]): e for e in numbers["effects"]}
    assert effects["tower", "both"]["score"] == 0.75  # by the linear connector alone
    assert effects["tower", "both"]["over"] == 2  # seeds
    assert [one["why"] for one in numbers["failed"]] == ["no room", "no room"]
    assert numbers["failed"][0]["run"] == "captions, mlp, seed 0"


def test_only_questions_that_all_runs_answered_count(tmp_path: Path) -> None:
    numbers = compared(tmp_path, SCORES | {("both", "mlp"): [1.0]})
    assert numbers["num_questions"] == 1
    assert [group["score"] for group in numbers["groups"]] == [1.0, 1.0, 1.0, 1.0]
    assert "3 questions that not all runs answered do not count." in numbers["facts"]


def test_a_seed_that_failed_for_one_value_makes_no_difference_between_values(
    tmp_path: Path,
) -> None:
    made = grid(tmp_path, "tower=captions,both", seeds=2)
    finished(made, {("captions",): [0.0, 0.0], ("both",): [0.0, 0.0]})
    better = next(c for c in made.cells if c.values == ("both",) and c.seed == 1)
    lost = next(c for c in made.cells if c.values == ("captions",) and c.seed == 1)
    line = {"seen": {"score": 1}, "blind": {"score": 0}, "text_only": {"score": 0}}
    (answers_in(better, ASKED) / "results.jsonl").write_text(
        "".join(json.dumps({"id": str(n), **line}) + "\n" for n in range(2))
    )
    numbers = numbers_of(made, {lost.folder: "no room"}, {}, ASKED)
    assert [effect["behind"] for effect in numbers["effects"]] == [0, 0]
    assert any(fact.startswith("NOT the same seeds") for fact in numbers["facts"])


def test_towers_with_equal_last_names_are_told_apart(tmp_path: Path) -> None:
    made = grid(tmp_path, "tower=a/x/model,b/x/model,c/y/model")
    named = [made.named(cell.values) for cell in made.cells]
    assert named == ["a/x/model", "b/x/model", "y/model"]


def test_a_resized_tower_has_a_folder_of_its_own(tmp_path: Path) -> None:
    made = grid(tmp_path, "image_size=112", "tower=t/a-1,t/a_1,./塔甲,./塔乙")
    folders = {cell.resized.folder for cell in made.cells if cell.resized}
    assert len(folders) == 4


def test_one_image_size_is_no_less_a_size(tmp_path: Path) -> None:
    made = grid(tmp_path, "image_size=112", "stages.tune.lora.r=4,8")
    assert all(cell.resized is not None for cell in made.cells)
    with pytest.raises(UsageError, match=r"vary stages\.both\.encoder"):
        grid(tmp_path, "image_size=112", "stages.untrained.train.lr=1e-9,1e-8")


def test_a_task_is_another_where_the_tower_behind_its_path_is(tmp_path: Path) -> None:
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "config.json").write_text("{}")
    made = grid(tmp_path / "out", f"tower={tower},./other")
    before, after = list[str](), list[str]()
    for digests in (before, after):
        tasks = tasks_of(made, ["python"], ["handwriting"], ASKED)
        digests += [task.digest for task in tasks]
        (tower / "config.json").write_text('{"other": 1}')
    assert before[0] == after[0]  # the stages before it
    assert before[1] != after[1]
    assert tasks_of(made, ["python"], ["handwriting"], "other")[1].digest != after[1]


@pytest.mark.parametrize("key", ["encoder", "decoder"])
def test_a_task_is_another_where_the_weights_that_it_starts_from_are(
    tmp_path: Path, key: str
) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_text("{}")
    start = f"stages.both.start.{key}={begun}"
    made = grid(tmp_path / "out", "connector=linear,mlp", overrides=(start,))
    tasks = tasks_of(made, ["python"], ["handwriting"], ASKED)
    before = [task.digest for task in tasks]
    (begun / "config.json").write_text('{"other": 1}')
    assert sum(one != task.digest for one, task in zip(before, tasks, strict=True)) == 1


def test_the_report_says_what_was_fair_and_what_was_not(tmp_path: Path) -> None:
    numbers = compared(tmp_path, SCORES)
    facts = "\n".join(numbers["facts"])
    assert "The same samples in the same order" in facts
    assert "Equal: tokens of a picture, 16." in facts
    told = page.describe(numbers)
    assert told["rows"][3][:5] == ["both", "mlp", "100.0", "51.0 to 100.0", "100.0 to 100.0"]
    assert [picture.name for picture in page.pictures(told)] == ["scores.png", "costs.png"]
    table = page.as_table(numbers).splitlines()
    assert table[0].startswith("| tower | connector | exact match, % |")
    assert len({line.count("|") for line in table}) == 1


def test_other_data_is_no_fair_comparison(tmp_path: Path) -> None:
    made = grid(tmp_path, "stages.tune.train.steps=200,300")
    failed = finished(made, {("200",): [1.0], ("300",): [1.0]})
    facts = numbers_of(made, failed, {}, ASKED)["facts"]
    assert any(fact.startswith("NOT the same samples") for fact in facts)


@pytest.mark.slow
def test_towers_are_compared_by_one_command_and_a_failed_run_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = ("image_only", "captions", "both", "align", "tune")
    short = [f"stages.{name}.train.steps=1" for name in stages]
    short += [f"stages.{name}.train.warmup_steps=0" for name in stages]
    words = [
        "compare",
        RECIPE,
        *short,
        "--vary",
        "connector=linear,{name: pixel_shuffle, factor: 3}",
    ]
    words += [
        "--limit",
        "14",
        "--max-new-tokens",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--jobs",
        "2",
    ]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "| linear |" in said.out
    assert "failed: pixel_shuffle 3, seed 0: stage align: connector pixel_shuffle" in said.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    [group] = summary["groups"]
    assert group["image_tokens"] == 16
    assert group["first_token_ms"] > 0
    assert group["train_tflop"] > 0
    assert group["controls"].keys() == {"text_only", "blind"}
    assert {"report.md", "report.html", "scores.png", "costs.png"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }
    scores = np.array([run["score"] for run in group["runs"]])
    assert ((scores >= 0) & (scores <= 1)).all()
