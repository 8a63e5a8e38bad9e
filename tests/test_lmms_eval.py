"""The verb `lmms-eval`: benchmarks read, run one by one, told; and lmms-eval's own loop beside
`evaluate`.

The loop runs in the environment that `make test` makes (`make .venv-lmms-eval/lmms_eval.txt`), or
in that of the interpreter AIMV2_TEST_LMMS_PYTHON; its tests are skipped without either.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_chat import llava as llava_of_chat

from aimv2_mllm import __main__ as cli
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation.answerers import Ours
from aimv2_mllm.lmms import command, environment
from aimv2_mllm.lmms.benchmarks import (
    Benchmark,
    Benchmarks,
    Number,
    benchmarks_of,
    numbers_of,
    table,
)

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "recipes" / "benchmarks" / "paper.yaml"
PYTHON = Path(os.environ.get("AIMV2_TEST_LMMS_PYTHON", ROOT / ".venv-lmms-eval/bin/python"))
llava = llava_of_chat  # a fixture: the folder of a tiny Llava of ours


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_names_and_files_name_benchmarks() -> None:
    assert benchmarks_of("mme, gqa,mme").wanted == (
        Benchmark("mme", "mme"),
        Benchmark("gqa", "gqa"),
    )
    paper = benchmarks_of(str(PAPER))
    assert len(paper.wanted) == 13
    assert paper.wanted[-1] == Benchmark("MME-P", "mme", "mme_perception_score", 1)
    assert paper.published["AIMv2-L 336"]["GQA"] == 72.5
    header = PAPER.read_text(encoding="utf-8").partition("benchmarks:")[0]
    for word in ("command", "hardware", "time", "expect", "not yet run", "source"):
        assert word in header


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: [", "cannot be read as YAML"),
        ("benchmarks: [mme]", "names no benchmarks"),
        ("benchmarks: {A: {metric: x}}", "benchmarks.A is .* must name a task"),
        ("benchmarks: {A: {task: a, metrc: x}}", "A.metrc: unknown key; .*did you mean metric"),
        ("benchmarks: {A: {task: a, scale: yes}}", "A.scale is true, must be a number"),
        ("benchmarks: {A/B: {task: a}}", "cannot be the name of a folder"),
        ("benchmarks: {A: {task: a}}\npublished: {us: {B: 1}}", "published.us.B: unknown key"),
        ("benchmarks: {A: {task: a}}\nmodel: x", "model: unknown key"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        benchmarks_of(written(tmp_path / "b.yaml", text))


@pytest.mark.parametrize("tasks", ["", "a,,b", "a/b", "mm*"])
def test_what_cannot_be_a_task_is_refused(tasks: str) -> None:
    with pytest.raises(UsageError, match="is no task: give names"):
        benchmarks_of(tasks)


TOLD = {
    "alias": "a",
    "exact_match,none": 0.5,
    "exact_match_stderr,none": 0.05,
    "exact_match_stderr_clt,none": 0.06,
    "acc,flexible": 0.25,
    "acc_stderr,flexible": "N/A",
    "submission,none": "file.json",
    "sent,none": None,  # as of ok_vqa_val2014 and textvqa_val
    "is_whole,none": True,
}


def test_the_numbers_of_a_task_are_its_metrics_scaled(tmp_path: Path) -> None:
    path = Path(written(tmp_path / "r.json", json.dumps({"results": {"a": TOLD}})))
    assert numbers_of(path, Benchmark("A", "a", "exact_match", 100)) == [
        Number("exact_match", 50, 5.0)
    ]
    assert numbers_of(path, Benchmark("a", "a")) == [
        Number("exact_match", 0.5, 0.05),
        Number("acc (flexible)", 0.25, None),
    ]
    with pytest.raises(UsageError, match="a has no number anls; there is exact_match, acc"):
        numbers_of(path, Benchmark("A", "a", "anls"))


def test_the_table_has_what_others_published_and_what_is_not_there() -> None:
    wanted = (Benchmark("A", "a", "m"), Benchmark("B", "b", "m"), Benchmark("C", "c"))
    asked = Benchmarks(wanted, {"them": {"A": 72.5, "B": 1472}})
    text = table(asked, {"A": [Number("m", 71.25, 0.512)]}, {"B": "no network"})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0] == ["benchmark", "task", "metric", "here", "them"]
    assert rows[2:] == [
        ["A", "a", "m", "71.25 ± 0.51", "72.5"],
        ["B", "b", "m", "failed", "1,472"],
        ["C", "c", "–", "not yet run", "–"],
    ]
    assert len({len(line) for line in text.splitlines()}) == 1


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("x\nE | Error during evaluation: no such split. Please set `--verb", "no such split"),
        (
            "ConnectionError: Couldn't reach 'a/b' on the Hub\n…\n\x1b[31mError during evaluation: "
            "RetryError[<Future at 0x7f state=finished raised ConnectionError>]. Please set `-",
            "Couldn't reach 'a/b' on the Hub",
        ),
        (
            "Error during evaluation: No module named 'cv2'. Please set `--verbosity",
            "needs the module cv2: install it in the environment",
        ),
        (
            "Error during evaluation: Currently messages is used for generation only. Please set",
            "compares likelihoods: give --simple",
        ),
        ("Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory", "torch.OutOfMemory"),
        ("nothing of the kind", None),
    ],
)
def test_why_lmms_eval_failed_is_one_line(log: str, why: str | None) -> None:
    told = command._why(log)
    assert (told is None) if why is None else (told or "").startswith(why)


# What stands in for the interpreter of an environment with lmms-eval.
FAKE = """#!{python}
import json, sys
from pathlib import Path
words = sys.argv[1:]
if words[1] == "aimv2_mllm.lmms.inventory":
    models = [] if Path("no_plugin").exists() else ["aimv2_mllm"]
    print("noise")
    print(json.dumps({{"version": "9", "tasks": ["good", "bad", "mme"], "models": models}}))
    sys.exit()
given = dict(zip(words[2:-1], words[3:]))
with open("calls.txt", "a") as file:
    print(*words, file=file)
if given["--tasks"] == "bad" and not Path("mended").exists():
    print("E | Error during evaluation: it is bad. Please set `--verbosity=DEBUG`")
    sys.exit()
folder = Path(given["--output_path"]) / "m"
folder.mkdir(parents=True)
told = {{"results": {{given["--tasks"]: {{"acc,none": 0.25, "acc_stderr,none": 0.125}}}}}}
(folder / "1_results.json").write_text(json.dumps(told))
print("it ran")
"""


@pytest.fixture
def fake(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The verb in an empty folder, with an environment whose lmms-eval is pretended."""
    monkeypatch.chdir(tmp_path)
    python = Path("env/bin/python")
    python.parent.mkdir(parents=True)
    python.write_text(FAKE.format(python=sys.executable))
    python.chmod(0o755)

    def call(tasks: str, *words: str, model: object = llava) -> int:
        return cli.main(["lmms-eval", str(model), tasks, "--environment", "env", *words])

    return call


def calls() -> list[str]:
    return Path("calls.txt").read_text().splitlines() if Path("calls.txt").exists() else []


def test_a_benchmark_that_fails_is_told_and_the_others_go_on_and_are_not_run_again(
    fake: Callable[..., int], llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fake("bad,good") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "it ran" in err
    last = err.splitlines()[-1]
    assert last == "aimv2-mllm: bad: it is bad; see lmms-eval/bad/log.txt"
    assert "| good" in (Path("lmms-eval") / "table.md").read_text()
    assert len(calls()) == 2
    Path("mended").touch()
    assert fake("bad,good") == 0
    out, err = capsys.readouterr()
    assert "good: is done already" in err
    assert [line.split("|")[4].strip() for line in out.splitlines()[2:]] == ["0.25 ± 0.12"] * 2
    assert [call.partition("--tasks ")[2].split()[0] for call in calls()] == ["bad", "good", "bad"]


def test_the_paper_s_table_stands_beside_the_numbers(
    fake: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "benchmarks: {MME-P: {task: mme, metric: acc, scale: 100}}\npublished: {L: {MME-P: 1472}}"
    )
    assert fake(written(Path("b.yaml"), text)) == 0
    assert "| MME-P     | mme  | acc    | 25 ± 12 | 1,472 |" in capsys.readouterr().out


def test_what_is_printed_is_what_is_run(
    fake: Callable[..., int], llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--limit", "3", "--dtype", "bf16", "--include-path", "more", "--simple"]
    assert fake("good", *words, "--print") == 0
    printed = capsys.readouterr().out
    assert not calls()
    assert printed == (
        f"env/bin/python -m lmms_eval --model aimv2_mllm --model_args pretrained={llava},"
        "dtype=bfloat16 --tasks good --batch_size 8 --output_path "
        "lmms-eval/good/lmms-eval --limit 3 --include_path more --log_samples --force_simple\n"
    )
    assert fake("good", *words) == 0
    assert [f"env/bin/python {call}" for call in calls()] == printed.splitlines()
    assert fake("good", "--processes", "4", "--print") == 0
    launched = capsys.readouterr().out.splitlines()[-1]
    assert launched.startswith(
        "env/bin/python -m accelerate.commands.launch --num_processes 4 -m lmms_eval --model"
    )
    assert fake("good", "--environment", "new", "--print") == 0
    assert "-m aimv2_mllm.lmms.environment new\nnew/bin/python" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tasks", "words", "why"),
    [
        ("goood", [], "lmms-eval 9 has no task goood; did you mean good?"),
        ("good", ["--environment", "."], ".: is there and is no virtual environment"),
        ("b.yaml", [], "b.yaml: cannot be read as YAML"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    fake: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tasks: str,
    words: list[str],
    why: str,
) -> None:
    assert fake(tasks, *words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"aimv2-mllm: {why}")
    assert err.count("\n") == 1
    assert not calls()


def test_models_that_are_not_there_or_cannot_be_named_are_refused(
    fake: Callable[..., int], llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fake("good", model="nowhere") == 2
    assert "nowhere: there is no such folder" in capsys.readouterr().err
    Path("a,b").symlink_to(llava)
    assert fake("good", model="a,b") == 2
    assert "a,b: lmms-eval takes no , in a name" in capsys.readouterr().err


def test_an_environment_without_the_plug_in_says_what_to_do(
    fake: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("no_plugin").touch()
    assert fake("good") == 2
    assert "its lmms-eval 9 does not find aimv2_mllm: install this" in capsys.readouterr().err


def test_results_of_another_limit_are_not_taken(
    fake: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fake("good", "--limit", "3") == 0
    assert fake("bad,good", "--limit", "4") == 2
    assert "lmms-eval/good: holds the answers of another evaluation, which differs in limit" in (
        capsys.readouterr().err
    )
    assert len(calls()) == 1


@pytest.mark.parametrize("name", ["tasks/good.yaml", "tasks/_template_yaml", "tasks/in/shown.py"])
def test_results_of_a_task_that_was_edited_are_not_taken(
    fake: Callable[..., int], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = Path(name)
    file.parent.mkdir(parents=True)
    file.write_text("before")
    words = ["--include-path", "tasks"]
    assert fake("good", *words) == 0
    (file.parent / "__pycache__").mkdir()
    (file.parent / "__pycache__" / "shown.pyc").touch()
    assert fake("good", *words) == 0
    assert "good: is done already" in capsys.readouterr().err
    file.write_text("after")
    assert fake("good", *words) == 2
    assert "another evaluation, which differs in include_path" in capsys.readouterr().err
    assert len(calls()) == 1


def test_results_of_a_hub_model_s_other_commit_are_not_taken(
    fake: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    asked = dict[str, Any]()

    def downloaded(repository: str, **words: Any) -> str:
        asked.update(words, repository=repository)
        return str(Path("hub/snapshots", asked["commit"]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloaded)
    for commit, code in (("abc", 0), ("abc", 0), ("def", 2)):
        asked["commit"] = commit
        assert fake("good", model="org/name") == code
    assert asked["repository"] == "org/name"
    assert not [name for name in asked["allow_patterns"] if "safetensors" in name.split(".")[-1]]
    assert "another evaluation, which differs in model" in capsys.readouterr().err
    [call] = calls()
    assert "--model_args pretrained=org/name@abc --tasks good" in call


def test_a_hub_model_is_printed_with_its_commit_where_that_is_known(
    fake: Callable[..., int], llava: Path, publish: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    publish(llava, "org/name", "0123abcd")
    for model, named in (
        ("org/name", "org/name@0123abcd"),
        ("org/name@main", "org/name@0123abcd"),
        ("org/other", "org/other"),  # the hub cannot be reached
    ):
        assert fake("good", "--print", model=model) == 0
        assert f" --model_args pretrained={named} --tasks " in capsys.readouterr().out
    assert not calls()


def test_an_environment_that_cannot_be_filled_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if "venv" in words:
            file = environment._layer_file(environment.python_of(Path(words[-1])))
            file.parent.mkdir(parents=True)
            environment.python_of(Path(words[-1])).parent.mkdir()
            environment.python_of(Path(words[-1])).touch()
            return subprocess.CompletedProcess(words, 0, "", "")
        said = "WARNING: Retrying (…) after connection broken by 'New…'\nERROR: No matching…"
        return subprocess.CompletedProcess(words, 1, "", said)

    monkeypatch.setattr(subprocess, "run", fail)
    for _ in range(2):  # the second finds it half made
        with pytest.raises(UsageError, match=r"cannot be installed; .* \(the package index cannot"):
            environment.demand_environment(tmp_path / "env", lambda _: None)


def test_every_version_of_the_environment_is_pinned() -> None:
    lines = environment.REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert "lmms_eval==0.7.3" in pinned
    assert all(line.count("==") == 1 for line in pinned)
    names = {line.partition("==")[0].lower() for line in pinned}
    assert not names & {"torch", "torchvision", "transformers", "timm", "numpy", "pillow"}


# One picture and a text, as most of lmms-eval's; messages of any number of pictures; a choice.
TASK = """
task: NAME
dataset_path: parquet
dataset_kwargs:
  data_files: {test: DATA}
test_split: test
doc_to_visual: !function shown.visuals
doc_to_text: "{{question}}"
metadata:
  - version: 0.0
"""
WRITTEN = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 6, until: ["</never>"]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
CHOSEN = """
output_type: multiple_choice
doc_to_target: 1
doc_to_choice: ["the red", "it", "one"]
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
TASKS = {
    "aimv2_one": f"{TASK}{WRITTEN}",
    "aimv2_talk": f"{TASK}{WRITTEN}doc_to_messages: !function shown.messages\n",
    "aimv2_choice": f"{TASK}{CHOSEN}",
}
SHOWN = """
def visuals(doc):
    return [doc["image"]]

def messages(doc):
    seen = [{"type": "image", "url": doc["image"]}] * (int(doc["number"]) % 3)
    return [{"role": "user", "content": [{"type": "text", "text": doc["question"]}, *seen]}]
"""
QUESTIONS = ["what is it", "where is the red one", "is it the one", "what is the red"]


@pytest.fixture(scope="module")
def world(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with seven questions as `evaluate` and as lmms-eval read them; to every other one
    the right answer is what the model says."""
    from datasets import Dataset
    from datasets import Image as Picture

    folder, bot = tmp_path_factory.mktemp("world"), Ours(llava)
    rows: list[dict[str, Any]] = []
    for number in range(7):
        noise = Image.effect_noise((28, 28 + 7 * number), 90).convert("RGB")
        noise.save(folder / f"{number}.png")
        question = QUESTIONS[number % 4]
        answer = bot([(question, noise)], 6)[0] if number % 2 else "it"
        row = {"number": number, "image": f"{number}.png", "question": question, "answer": answer}
        rows.append(row)
    lines = [json.dumps({**row, "id": str(row["number"])}) + "\n" for row in rows]
    (folder / "q.jsonl").write_text("".join(lines))
    data = [{**row, "image": str(folder / row["image"])} for row in rows]
    Dataset.from_list(data).cast_column("image", Picture()).to_parquet(folder / "q.parquet")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "shown.py").write_text(SHOWN)
    for name, text in TASKS.items():
        told = text.replace("NAME", name).replace("DATA", str(folder / "q.parquet"))
        (folder / "tasks" / f"{name}.yaml").write_text(told)
    return folder


@pytest.fixture
def loop(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an environment with lmms-eval, to be used in `world`."""
    if not PYTHON.exists():
        pytest.skip(f"there is no {PYTHON}: make .venv-lmms-eval/lmms_eval.txt")
    monkeypatch.chdir(world)
    monkeypatch.setenv("HF_HOME", str(world / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return PYTHON.parents[1]


def samples(folder: str, task: str) -> list[dict[str, Any]]:
    [file] = Path(folder).rglob(f"*_samples_{task}.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(found, key=lambda sample: sample["doc_id"])


@pytest.mark.slow
def test_lmms_eval_s_own_loop_and_evaluate_get_equal_answers_and_numbers(
    loop: Path, llava: Path
) -> None:
    words = ["--max-new-tokens", "6", "--no-controls", "--out", "ours"]
    assert cli.main(["evaluate", str(llava), "q.jsonl", *words]) == 0
    words = ["--environment", str(loop), "--include-path", "tasks", "--out", "theirs"]
    assert cli.main(["lmms-eval", str(llava), "aimv2_one,aimv2_talk", *words]) == 0
    ours = [json.loads(line) for line in Path("ours/results.jsonl").read_text().splitlines()]
    theirs = samples("theirs/aimv2_one", "aimv2_one")
    assert [line["filtered_resps"] for line in theirs] == [line["seen"]["answer"] for line in ours]
    assert [line["exact_match"] for line in theirs] == [line["seen"]["score"] for line in ours]
    told = json.loads(Path("theirs/aimv2_one/results.json").read_text())["results"]["aimv2_one"]
    score = json.loads(Path("ours/summary.json").read_text())["score"]
    assert told["exact_match,none"] == pytest.approx(score)
    assert 0 < score < 1
    # Messages with no picture, one and two of them, behind the text.
    bot, expected = Ours(llava), []
    for line in ours:
        number = int(line["id"])
        pictures = [Image.open(f"{number}.png")] * (number % 3)
        parts = [{"type": "text", "text": line["question"]}, *[{"type": "image"}] * len(pictures)]
        expected += bot.reply([([{"role": "user", "content": parts}], pictures)], 6)
    talked = samples("theirs/aimv2_talk", "aimv2_talk")
    assert [line["filtered_resps"] for line in talked] == expected
    assert len(set(expected)) > 3


@pytest.mark.slow
def test_two_processes_and_the_simple_class_get_them_too(loop: Path, llava: Path) -> None:
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "-m",
        "lmms_eval",
    ]
    words = ["--model", "aimv2_mllm", "--model_args", f"pretrained={llava}", "--log_samples"]
    words += ["--tasks", "aimv2_one,aimv2_choice", "--include_path", "tasks", "--force_simple"]
    done = subprocess.run(
        [loop / "bin" / "python", *launch, *words, "--output_path", "two"],
        capture_output=True,
        text=True,
    )
    assert list(Path("two").rglob("*_results.json")), done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in Path("q.jsonl").read_text().splitlines()]
    asked = [(line["question"], Image.open(line["image"])) for line in lines]
    given = samples("two", "aimv2_one")
    assert [line["filtered_resps"] for line in given] == Ours(llava)(asked, 6)
    # The least mean cross-entropy is lmms-eval's choice.
    from aimv2_mllm.chat.scoring import likelihood

    bot = Ours(llava).bot
    for sample, (question, picture) in zip(samples("two", "aimv2_choice"), asked, strict=True):
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        talk = [{"role": "user", "content": parts}]
        expected = [likelihood(bot, talk, [picture], text) for text in ("the red", "it", "one")]
        told = [float(loss) for loss, _ in sample["filtered_resps"]]
        assert told == pytest.approx([one.loss for one in expected], abs=1e-4)
        assert sample["acc"] == (min(range(3), key=told.__getitem__) == 1)


def test_the_paper_s_benchmarks_are_tasks_of_lmms_eval_with_these_metrics(loop: Path) -> None:
    [folder] = loop.glob("lib/python*/site-packages/lmms_eval/tasks")
    texts = {path: path.read_text() for path in folder.rglob("*.yaml")}
    for one in benchmarks_of(str(PAPER)).wanted:
        own = re.compile(rf"""^task\s*:\s*["']?{one.task}["']?\s*$""", re.MULTILINE)
        [file] = [path for path, text in texts.items() if own.search(text)]
        text = texts[file]
        for name in re.findall(r"^include:\s*(\S+)\s*$", text, re.MULTILINE):
            text += (file.parent / name).read_text()
        metric = rf"metric:\s*{one.metric}\s*$"
        assert re.search(metric, text, re.MULTILINE), (file, one.metric)
