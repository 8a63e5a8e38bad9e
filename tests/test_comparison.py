"""A recipe in variants: which runs there are, what becomes of them, what they are worth."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from aimv2_mllm.__main__ import main
from aimv2_mllm.comparison import page
from aimv2_mllm.comparison.compare import digest_of
from aimv2_mllm.comparison.grid import Cell, Grid, grid_of
from aimv2_mllm.comparison.numbers import numbers_of
from aimv2_mllm.comparison.running import LOG, do_all
from aimv2_mllm.comparison.tasks import DONE, Task, answers_in, tasks_of, undone
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation.questions import Questions
from aimv2_mllm.folders import STAGE_FILE
from aimv2_mllm.recipe.stages import AlignStage
from aimv2_mllm.recipe.tune import TuneStage

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
    assert {align_of(cell).connector.name for cell in made.cells} == {"mlp", "pixel_shuffle"}


def align_of(cell: Cell) -> AlignStage:
    align = cell.recipe.stages["align"]
    assert isinstance(align, AlignStage)
    return align


def tasks(made: Grid, asked: str = ASKED) -> dict[str, Task]:
    return {task.name: task for task in tasks_of(made, ["python"], ["handwriting"], asked)}


def test_what_the_runs_have_in_common_is_trained_once_for_a_seed(tmp_path: Path) -> None:
    made = grid(tmp_path, "connector=linear,mlp", seeds=2)
    assert [(one.stage, one.seed) for one in made.common] == [("both", 0), ("both", 1)]
    for one in made.common:
        assert list(one.recipe.stages) == ["both"]
        assert one.recipe.seed == one.seed
        cells = [cell for cell in made.cells if cell.seed == one.seed]
        assert [list(cell.recipe.stages) for cell in cells] == [["align", "tune"]] * 2
        assert {align_of(cell).tower for cell in cells} == {str(one.result)}
        assert one.result == one.recipe.output.absolute() / "both" / "model"


def test_a_common_stage_holds_up_only_the_runs_that_need_it(tmp_path: Path) -> None:
    made = grid(tmp_path, "tower=captions,both")
    towers = {one.stage: one for one in made.common}
    assert list(towers) == ["captions", "both"]  # and neither untrained nor image_only
    todo = tasks(made)
    for name, tower in towers.items():
        assert todo[f"common stage {name}"].after == ()
        assert todo[name].after == (tower.folder,)
        assert align_of(next(c for c in made.cells if c.values == (name,))).tower == str(
            tower.result
        )


def test_where_only_the_last_stage_varies_the_one_before_it_is_common_too(tmp_path: Path) -> None:
    made = grid(tmp_path, "stages.tune.lora.r=4,8")
    both, align = made.common
    tune = made.cells[0].recipe.stages["tune"]
    assert isinstance(tune, TuneStage)
    assert (align.stage, tune.start) == ("align", str(align.result))
    todo = tasks(made)
    assert todo["common stage align"].after == (both.folder,)
    assert todo["4"].after == (align.folder,)


def test_what_a_varied_stage_is_made_into_is_not_common(tmp_path: Path) -> None:
    made = grid(tmp_path, "stages.both.encoder.image_size=56,112")
    assert made.common == ()
    assert [list(cell.recipe.stages) for cell in made.cells] == [["both", "align", "tune"]] * 2


def test_a_tower_is_resized_once_for_every_size(tmp_path: Path) -> None:
    made = grid(tmp_path, "image_size=56,112", "connector=linear,mlp")
    todo = tasks(made)
    resized = [task for name, task in todo.items() if name.startswith("tower")]
    assert len(resized) == 2
    for cell in made.cells:
        assert cell.resized is not None
        assert align_of(cell).tower == str(cell.resized.folder)
        own = next(task for task in resized if task.makes == (cell.resized.folder,))
        assert todo[made.named(cell.values)].after == (own.folder,)
    [last] = resized[-1].commands
    assert last[-2:] == ("--image-size", "112")
    assert resized[-1].after == (tmp_path / "shared" / "both-seed-0",)


def test_features_are_kept_where_pictures_have_an_end(tmp_path: Path) -> None:
    photos = 'stages.align.data.sources=[{kind: questions, folder: "photos"}]'
    made = grid(tmp_path, "connector=linear,mlp", overrides=(photos,))
    align, tune = (made.cells[0].recipe.stages[name].data for name in ("align", "tune"))
    assert align.features.folder == str(tmp_path / "features")  # type: ignore[union-attr]
    assert tune.features is None  # type: ignore[union-attr]
    native = (photos, "stages.align.data.image_aspect=native")
    align = grid(tmp_path, "connector=linear,mlp", overrides=native).cells[0].recipe.stages["align"]
    assert align.data.features is None  # squares alone are kept


def test_the_connector_of_a_tune_stage_that_says_none_varies_too(tmp_path: Path) -> None:
    plain = yaml.safe_load(Path(RECIPE).read_text())
    del plain["stages"]["align"]
    plain["stages"]["tune"] |= {"start": None, "tower": "both", "llm": "tiny_llm"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    made = grid_of(str(tmp_path / "recipe.yaml"), (), ["connector=linear,mlp"], 1, tmp_path)
    tunes = [cell.recipe.stages["tune"] for cell in made.cells]
    assert [tune.connector.name for tune in tunes] == ["linear", "mlp"]  # type: ignore[union-attr]


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
    said = capsys.readouterr().err
    assert "./nowhere: there is no such folder for './nowhere' to start from; correct" in said
    assert not (tmp_path / "out").exists()


def test_other_pictures_of_the_same_names_are_other_questions(tmp_path: Path) -> None:
    (tmp_path / "questions.csv").write_text("image,question,answer\na.png,Red?,no\nb.png,Red?,no")
    questions = Questions(str(tmp_path))
    digests = set()
    for colour in ("red", "red", "blue"):
        for name in ("a.png", "b.png"):
            Image.new("RGB", (8, 8), colour).save(tmp_path / name)
        digests.add(digest_of(questions.load(), questions))
    assert len(digests) == 2


def test_a_comma_inside_quotes_belongs_to_the_value(tmp_path: Path) -> None:
    made = grid(tmp_path, 'tower="./my, folder",./other')
    assert made.axes[0].values == ('"./my, folder"', "./other")
    assert align_of(made.cells[0]).tower == "./my, folder"


def test_what_ends_without_a_model_that_talks_is_refused(tmp_path: Path) -> None:
    recipe = str(Path(RECIPE).with_name("ablation.yaml"))
    with pytest.raises(UsageError, match="ends with a pretrain stage"):
        grid_of(recipe, (), ("stages.both.train.lr=1e-3,2e-3",), 1, tmp_path)


def run_of(folder: Path, code: str, *after: Path) -> Task:
    return Task(folder.name, folder, ((sys.executable, "-c", code),), after=after)


def test_a_failed_run_is_told_in_its_own_last_words_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    tasks = [
        run_of(tmp_path / "bad", "import sys; print('aimv2-mllm: no room'); sys.exit(2)"),
        run_of(tmp_path / "behind", "print(1)", tmp_path / "bad"),
        run_of(tmp_path / "good", "print('fine')"),
    ]
    failed = do_all(tasks, 1, said.append)
    assert failed.keys() == {tmp_path / "bad", tmp_path / "behind"}
    assert failed[tmp_path / "bad"].startswith("no room (see ")
    assert "fine" in (tmp_path / "good" / LOG).read_text()
    assert not (tmp_path / "behind").exists()
    assert [line.split(":")[0] for line in said] == ["bad", "good"]


def test_a_run_that_was_killed_is_said_to_be(tmp_path: Path) -> None:
    code = "import os; print('aimv2-mllm: step 3'); os.kill(os.getpid(), 9)"
    bad = run_of(tmp_path / "bad", code)
    failed = do_all([bad], 1, lambda _: None)
    assert failed[bad.folder].startswith("ended by SIGKILL, as where memory is short")


def test_why_a_run_failed_is_what_its_last_command_said(tmp_path: Path) -> None:
    codes = ("print('aimv2-mllm: an old line')", "print('the last words'); raise SystemExit(3)")
    commands = tuple((sys.executable, "-c", code) for code in codes)
    [why] = do_all([Task("two", tmp_path / "two", commands)], 1, lambda _: None).values()
    assert why.startswith("the last words (see")


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    good, bad = run_of(tmp_path / "good", code), run_of(tmp_path / "bad", f"{code}; 1 / 0")
    for _ in range(2):
        assert do_all([good, bad], 2, lambda _: None).keys() == {tmp_path / "bad"}
    assert (tmp_path / "count").read_text() == "xxx"
    assert not run_of(tmp_path / "good", "print('other')").is_done()


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
        do_all([run_of(tmp_path / "long", code)], 1, lambda _: None)
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


def finished(
    made: Grid, scores: dict[tuple[str, ...], list[float]], **record: Any
) -> dict[Path, str]:
    """Write what the runs of `made` would leave behind, `record` of each stage too: these scores,
    raised by a question for every seed but the first; those that have none failed, and why."""
    failed = {}
    for cell in made.cells:
        if cell.values not in scores:
            failed[cell.folder] = "no room"
            continue
        for name in cell.recipe.stages:
            trained(cell.recipe.output / name / "model", **record)
        own = list(scores[cell.values])
        for _ in range(cell.seed):
            own[own.index(0) if 0 in own else 0] = 1
        answered(cell, own)
    return failed


def trained(folder: Path, last: dict[str, Any] | None = None, **record: Any) -> None:
    """Write the record of a stage."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "parts": [["tower", 1000, False], ["connector", 10, True]],
        "seconds": 2.0,
        "last": {"memory_gib": 0.5, "samples": 8, "tokens": 40, "flops": 3e12, **(last or {})},
    }
    (folder / STAGE_FILE).write_text(json.dumps({**told, **record}))


def answered(cell: Cell, scores: list[float]) -> None:
    """Write what a run's answers were worth."""
    controls = {"blind": {"score": 0}, "text_only": {"score": 1}}
    lines = [{"id": str(n), "seen": {"score": one}, **controls} for n, one in enumerate(scores)]
    answers_in(cell, ASKED).mkdir(exist_ok=True)
    (answers_in(cell, ASKED) / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))


# What `compare` adds to the numbers.
TOLD: dict[str, Any] = {
    "recipe": RECIPE, "data": "handwriting", "metric": "exact", "jobs": 1, "command": "x",
    "versions": {"torch": "2"},
}  # fmt: skip


def compared(
    tmp_path: Path, scores: dict[tuple[str, ...], list[float]], **record: Any
) -> dict[str, Any]:
    made = grid(tmp_path, "tower=captions,both", "connector=linear,mlp", seeds=2)
    failed = finished(made, scores, **record)
    speed = {values: {"image_tokens": 16, "first_token_ms": 5.0} for values in scores}
    return numbers_of(made, failed, speed, ASKED) | TOLD


SCORES = {
    ("captions", "linear"): [1.0, 0.0, 0.0, 0.0],
    ("captions", "mlp"): [1.0, 1.0, 0.0, 0.0],
    ("both", "linear"): [1.0, 1.0, 1.0, 0.0],
    ("both", "mlp"): [1.0, 1.0, 1.0, 1.0],
}


def test_scores_are_means_over_seeds_and_effects_over_the_other_axes(tmp_path: Path) -> None:
    numbers = compared(tmp_path, SCORES)
    # Of the second seed one question more is right than of the first: 0.5, 0.75, 1 and 1.
    assert [group["score"] for group in numbers["groups"]] == [0.375, 0.625, 0.875, 1.0]
    ends = [(group["least"], group["most"]) for group in numbers["groups"]]
    assert ends == [(0.25, 0.5), (0.5, 0.75), (0.75, 1.0), (1.0, 1.0)]
    assert [run["score"] for run in numbers["groups"][0]["runs"]] == [0.25, 0.5]
    effects = {(e["axis"], e["value"]): e for e in numbers["effects"]}
    captions = effects["tower", "captions"]
    assert captions["score"] == 0.5
    assert captions["behind"] == 0.4375
    assert captions["behind_of_seeds"] == {0: 0.5, 1: 0.375}
    assert effects["tower", "both"]["behind"] == 0
    assert effects["connector", "linear"]["behind"] == 0.1875
    low, high = captions["behind_interval"]
    assert 0 < low < 0.4375 < high <= 1
    assert captions["told_apart"]
    assert numbers["groups"][0]["controls"] == {"text_only": 1, "blind": 0}
    # Of the align and the tune stage together.
    assert numbers["groups"][0]["train_tflop"] == 6
    assert numbers["groups"][0]["samples"] == 16


@pytest.mark.parametrize(
    ("of_seeds", "apart"),
    [
        ([[1, 1, 1, 1], [1, 1, 0, 0]], True),  # ahead with both seeds
        ([[1, 1, 1, 1], [0, 0, 0, 0]], False),  # ahead with one, level with the other
        ([[1, 1, 1, 1]], False),  # with the one seed that there is
    ],
)
def test_what_seeds_do_not_agree_on_is_not_told_apart(
    tmp_path: Path, of_seeds: list[list[float]], apart: bool
) -> None:
    made = grid(tmp_path, "tower=captions,both", seeds=len(of_seeds))
    finished(made, {("captions",): [0] * 4, ("both",): [0] * 4})
    for cell in made.cells:
        answered(cell, of_seeds[cell.seed] if cell.values == ("both",) else [0.0] * 4)
    numbers = numbers_of(made, {}, {}, ASKED)
    captions = next(effect for effect in numbers["effects"] if effect["value"] == "captions")
    assert captions["behind"] > 0
    assert captions["told_apart"] == apart
    told = page.describe(numbers | TOLD)["effects"][0]
    assert told["behind"].endswith("behind the best" if apart else ", not told apart")
    assert told["of_seeds"] == ", ".join(f"{25 * sum(scores):.1f}" for scores in of_seeds)


def test_questions_about_one_picture_stay_together(tmp_path: Path) -> None:
    made = grid(tmp_path, "tower=captions,both")
    failed = finished(made, {("captions",): [0.0] * 8, ("both",): [1.0, 0.0] * 4})
    ends = []
    for of_picture in (1, 2):
        for cell in made.cells:
            path = answers_in(cell, ASKED) / "results.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for place, line in enumerate(lines):
                line["picture"] = str(place // of_picture)
            path.write_text("\n".join(map(json.dumps, lines)))
        numbers = numbers_of(made, failed, {}, ASKED)
        [_, both] = numbers["groups"]
        captions, _ = numbers["effects"]
        ends.append((both["interval"], captions["behind_interval"]))
    # Of each two questions one is right: by picture there is nothing that differs.
    (apart, behind_apart), (together, behind_together) = ends
    assert apart != together
    assert behind_apart[0] < 0.3
    assert behind_together != behind_apart


def test_scores_that_are_no_shares_have_no_interval_of_shares(tmp_path: Path) -> None:
    made = grid(tmp_path, "tower=captions,both")
    failed = finished(made, {("captions",): [0.0] * 30, ("both",): [0.0] * 30})
    of_shares, of_others = (
        numbers_of(made, failed, {}, ASKED, are_shares=share)["groups"][0]["interval"]
        for share in (True, False)
    )
    assert of_shares != of_others == [0, 0.1]  # 3 / 30, as of what was not seen in 30 draws


def test_effects_leave_out_what_failed_for_another_value(tmp_path: Path) -> None:
    left = {values: found for values, found in SCORES.items() if values != ("captions", "mlp")}
    numbers = compared(tmp_path, left)
    effects = {(e["axis"], e["value"]): e for e in numbers["effects"]}
    assert effects["tower", "both"]["score"] == 0.875  # by the linear connector alone
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
    lost = next(c for c in made.cells if c.values == ("captions",) and c.seed == 1)
    answered(next(c for c in made.cells if c.values == ("both",) and c.seed == 1), [1.0, 1.0])
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
        grid(tmp_path, "image_size=112", "stages.both.train.lr=1e-9,1e-8")


def note_done(made: Grid) -> None:
    """Leave of every task what it makes, in an order in which they can be done."""
    for one in tasks(made).values():
        for path in one.makes:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.json").write_text("{}")
        one.folder.mkdir(parents=True, exist_ok=True)
        (one.folder / DONE).write_text(json.dumps({"digest": one.digest}))


def to_do(made: Grid, asked: str = ASKED) -> list[str]:
    return [task.name for task in undone(list(tasks(made, asked).values()))]


def test_what_is_made_of_another_tower_behind_the_same_path_is_to_be_made_anew(
    tmp_path: Path,
) -> None:
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "config.json").write_text("{}")
    made = grid(tmp_path / "out", f"tower={tower},both")
    note_done(made)
    assert to_do(made) == []
    assert to_do(made, "other") == [made.named(cell.values) for cell in made.cells]
    (tower / "config.json").write_text('{"other": 1}')
    assert to_do(made) == [made.named((str(tower),))]
    (tower / "see" / "model").mkdir(parents=True)  # a run, whose result counts
    note_done(made)
    assert to_do(made) == []
    (tower / "see" / "model" / "config.json").write_text("{}")
    assert to_do(made) == [made.named((str(tower),))]


def test_a_tower_is_resized_anew_where_another_is_behind_the_same_path(tmp_path: Path) -> None:
    tower = tmp_path / "tower"
    tower.mkdir()
    (tower / "config.json").write_text("{}")
    made = grid(tmp_path / "out", "image_size=56,112", overrides=(f"stages.align.tower={tower}",))
    note_done(made)
    assert to_do(made) == []
    (tower / "config.json").write_text('{"other": 1}')
    resized = [cell.resized.folder.name for cell in made.cells if cell.resized]
    assert to_do(made) == [f"tower {resized[0]}", "56", f"tower {resized[1]}", "112"]


@pytest.mark.parametrize("lost", ["answers", "model"])
def test_a_run_that_lost_its_answers_or_its_model_is_not_done(tmp_path: Path, lost: str) -> None:
    made = grid(tmp_path, "connector=linear,mlp")
    note_done(made)
    cell = made.cells[0]
    shutil.rmtree(
        answers_in(cell, ASKED) if lost == "answers" else cell.recipe.output / "tune" / "model"
    )
    assert to_do(made) == ["linear"]


def test_a_common_stage_that_lost_its_model_is_made_again_with_what_is_made_of_it(
    tmp_path: Path,
) -> None:
    made = grid(tmp_path, "tower=captions,both")
    note_done(made)
    shutil.rmtree(made.common[0].result)
    assert to_do(made) == ["common stage captions", "captions"]


def test_one_look_of_the_tower_through_kept_pictures_counts_for_every_run(tmp_path: Path) -> None:
    def features(pictures: str) -> dict[str, Any]:
        return {"of": pictures, "took": {"flops": 5e12, "seconds": 7.0}}

    made = grid(tmp_path, "connector=linear,mlp")
    finished(made, {("linear",): [1.0], ("mlp",): [1.0]}, features=features("tower/1"))
    other = made.cells[1].recipe.output / "tune" / "model"
    trained(other, features=features("tower/2"))
    linear, mlp = numbers_of(made, {}, {}, ASKED)["groups"]
    # Two stages of 3 TFLOP and 2 s, about the same pictures and about others.
    assert (linear["train_tflop"], linear["train_seconds"]) == (6 + 5, 4 + 7)
    assert (mlp["train_tflop"], mlp["train_seconds"]) == (6 + 2 * 5, 4 + 2 * 7)


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
    assert told["rows"][0][4] == "25.0 to 50.0"
    assert told["effects"][0]["of_seeds"] == "50.0, 37.5"
    assert [picture.name for picture in told["pictures"]] == ["scores.png", "costs.png"]
    table = page.as_table(numbers).splitlines()
    assert table[0].startswith("| tower | connector | exact match, % |")
    assert len({line.count("|") for line in table}) == 1


def test_other_data_is_no_fair_comparison(tmp_path: Path) -> None:
    made = grid(tmp_path, "stages.tune.train.steps=200,300")
    failed = finished(made, {("200",): [1.0], ("300",): [1.0]})
    facts = numbers_of(made, failed, {}, ASKED)["facts"]
    assert any(fact.startswith("NOT the same samples in the same order") for fact in facts)


@pytest.mark.parametrize(
    ("linear", "mlp", "fact"),
    [
        ({}, {"tokens": 50}, "The same samples in the same order"),  # by another tokenizer
        ({"skipped_turns": 3}, {"skipped_turns": 3}, "The same samples in the same order"),
        ({}, {"skipped_too_long": 3}, "NOT the same samples: rows .* 0 to 3 of a run with seed 0"),
        ({"skipped_turns": 3}, {"skipped_too_long": 3}, "NOT the same samples: rows"),
        ({"skipped_turns": 3}, {"skipped_turns": 3, "tokens": 50}, "NOT the same samples: rows"),
    ],
)
def test_samples_that_were_left_out_or_cut_are_no_longer_the_same(
    tmp_path: Path, linear: dict[str, int], mlp: dict[str, int], fact: str
) -> None:
    made = grid(tmp_path, "connector=linear,mlp")
    finished(made, {("linear",): [1.0], ("mlp",): [1.0]})
    for cell, last in zip(made.cells, (linear, mlp), strict=True):
        trained(cell.recipe.output / "tune" / "model", last)
    facts = numbers_of(made, {}, {}, ASKED)["facts"]
    assert any(re.match(fact, one) for one in facts), facts


STAGES = ("image_only", "captions", "both", "align", "tune")
SHORT = [f"stages.{name}.train.{word}" for name in STAGES for word in ("steps=1", "warmup_steps=0")]


@pytest.mark.slow
def test_towers_are_compared_by_one_command_and_a_failed_run_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--vary", "connector=linear,{name: pixel_shuffle, factor: 3}", "--jobs", "2"]
    words += ["--limit", "14", "--max-new-tokens", "2", "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        main(["compare", RECIPE, *SHORT, *words])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "| linear |" in said.out
    assert "failed: pixel_shuffle 3, seed 0: stage align: connector pixel_shuffle" in said.err
    summary = json.loads((out / "summary.json").read_text())
    [group] = summary["groups"]
    assert group["image_tokens"] == 16
    assert group["first_token_ms"] > 0
    assert group["train_tflop"] > 0
    assert group["controls"].keys() == {"text_only", "blind"}
    assert {"report.md", "report.html", "scores.png", "costs.png"} <= {
        file.name for file in out.iterdir()
    }
    assert [folder.name for folder in (out / "shared").iterdir()] == ["both-seed-0"]
    scores = np.array([run["score"] for run in group["runs"]])
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.slow
def test_towers_of_several_sizes_are_made_trained_on_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--vary", "image_size=28,84", "--jobs", "2", "--no-controls"]
    words += ["--limit", "14", "--max-new-tokens", "2", "--out", str(out)]
    assert main(["compare", RECIPE, *SHORT, *words]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["image_size", "28", "84"]
    groups = json.loads((out / "summary.json").read_text())["groups"]
    assert [group["image_tokens"] for group in groups] == [4, 36]
    for size, group in zip((28, 84), groups, strict=True):
        [run] = group["runs"]
        for stage in ("align", "tune"):
            folder = Path(run["folder"]) / "run" / stage / "model"
            told = json.loads((folder / "config.json").read_text())["vision_config"]
            assert told["image_size"] == size
            weights = load_file(folder / "model.safetensors")
            [positions] = [w for name, w in weights.items() if "position_embedding" in name]
            assert len(positions) == (size // 14) ** 2
