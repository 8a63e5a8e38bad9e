"""The command line: what it prints where, its exit codes, one short message for every mistake."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from test_images import cut_jpeg, cut_png, png_header

import aimv2_mllm
from aimv2_mllm import __main__ as cli
from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.errors import RunFailed
from aimv2_mllm.flags.parser import parse

ROOT = Path(aimv2_mllm.__file__).parents[1]
RECIPE = """\
name: tiny
stages:
  words:
    kind: language
    vocab_size: 300
    model: {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
            num_key_value_heads: 2, max_position_embeddings: 64}
    train: {steps: 2, batch_size: 2, lr: 1e-3}
"""
HEAVY = ("torch", "transformers", "pydantic", "numpy", "PIL", "yaml", "sklearn")

Refused = Callable[..., str]


def in_shell(*words: str, **options: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user's shell starts it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "aimv2_mllm", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)  # type: ignore[call-overload, no-any-return]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with one picture and one recipe, in which the command is typed."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 10), "white").save("sheet.png")
    Path("tiny.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """A function from the words of a command that must fail with 2 to what stderr says."""

    def call(*words: str) -> str:
        before = sorted(here.rglob("*"))
        assert cli.main(words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        assert all(line.startswith("aimv2-mllm: ") for line in err.splitlines())
        assert sorted(here.rglob("*")) == before, "something was left behind"
        return err

    return call


def model_folder(folder: Path, kind: str, source: str = "handwriting") -> str:
    folder.mkdir()
    record = {"stage": "s", "kind": kind, "recipe": {"data": {"sources": [{"kind": source}]}}}
    (folder / "stage.json").write_text(json.dumps(record))
    return str(folder)


def test_help_is_instant_and_imports_nothing_heavy() -> None:
    seconds = []
    for _ in range(3):
        begun = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = in_shell("--help")
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime)
        assert done.returncode == 0
        assert all(re.search(rf"\n    {verb}\s", done.stdout) for verb in cli.VERBS)
    print(f"--help: {min(seconds):.3f} s")
    assert min(seconds) < 0.5  # of the processor: a clock would measure who else is at work

    code = (
        "import sys, contextlib, aimv2_mllm.__main__ as cli\n"
        "with contextlib.suppress(SystemExit): cli.main(['chat', '--help'])\n"
        f"print('heavy:', *(name for name in {HEAVY} if name in sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    assert "usage: aimv2-mllm chat" in done.stdout
    assert done.stdout.endswith("heavy:\n")


def test_a_process_of_its_own_says_one_line_and_ends_with_2(here: Path) -> None:
    done = in_shell("run", "absent.yaml", cwd=str(here))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("aimv2-mllm: absent.yaml: no such recipe; the recipes in . are")
    assert done.stderr.count("\n") == 1


def test_a_verb_is_needed(refused: Refused) -> None:
    assert f"a verb is missing: {', '.join(cli.VERBS)}; see aimv2-mllm --help" in refused()


def test_an_unknown_verb_gets_the_nearest(refused: Refused) -> None:
    known = ", ".join(cli.VERBS)
    expected = f"aimv2-mllm: unknown verb rum; the verbs are {known}; did you mean run?\n"
    assert refused("rum", "tiny.yaml") == expected
    assert "did you mean" not in refused("xyzzy")


def test_missing_and_unknown_words_are_one_line(refused: Refused) -> None:
    said = "arguments are required: MODEL, OUT; see aimv2-mllm sample --help\n"
    assert refused("sample").endswith(said)
    assert "arguments are required: RECIPE" in refused("run")
    assert "unrecognized arguments: --colour" in refused("sample", "m", "x.png", "--colour", "red")
    assert "unrecognized arguments: --imag" in refused("chat", "m", "--imag", "sheet.png")
    assert "--prompt: expected one argument" in refused("chat", "m", "--prompt")


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "1_0", "9" * 30, "٣"])
def test_numbers_out_of_range_are_refused(refused: Refused, value: str) -> None:
    said = refused("chat", "m", "--image", "sheet.png", f"--max-tokens={value}")
    assert f"--max-tokens: is {value}, must be a whole number, 1 to 100000" in said
    said = refused("sample", "m", "out.png", f"--size={value}")
    assert f"--size: is {value}, must be a whole number, 28 to 4096" in said


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--temperature=9", "--temperature: is 9, must be 0 (always the likeliest), or 0.01 to 2"),
        ("--temperature=nan", "--temperature: is nan, must be"),
        ("--top-p=0", "--top-p: is 0, must be above 0, up to 1 (all)"),
        ("--top-p=0_1", "--top-p: is 0_1, must be"),
        ("--top-k=1.5", "--top-k: is 1.5, must be 0 (all), or a whole number from 1 on"),
        ("--seed=-1", "--seed: is -1, must be a whole number from 0 on"),
        ("--seed=inf", "--seed: is inf, must be"),
        ("--stop=", "stop has an empty text: give what an answer is to end before"),
        ("--system= ", "--system is empty: say something, or leave it out"),
    ],
)
def test_settings_of_an_answer_out_of_range_are_refused(
    refused: Refused, flag: str, why: str
) -> None:
    said = refused("chat", "m", "--image", "sheet.png", flag)
    assert why in said
    assert said.count("\n") == 1


def test_what_is_no_recipe_is_refused(refused: Refused, here: Path) -> None:
    (here / "letter.yaml").write_text("Dear reader,\n\tthis is: no: recipe")
    assert "letter.yaml:2:" in refused("run", "letter.yaml")
    (here / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bytes.yaml: is not UTF-8 text" in refused("run", "bytes.yaml")
    assert "is a folder; the recipes in" in refused("run", str(here))


def test_three_mistakes_are_named_at_once(refused: Refused, here: Path) -> None:
    wrong = RECIPE.replace("vocab_size", "vocabsize").replace("steps: 2", "steps: 0")
    (here / "wrong.yaml").write_text(wrong.replace("lr: 1e-3", "lr: fast"))
    said = refused("run", "wrong.yaml")
    for key in ("stages.words.vocabsize: unknown key", "train.steps: is 0", 'train.lr: is "fast"'):
        assert key in said
    assert all(re.match(r"aimv2-mllm: wrong.yaml:\d+: ", line) for line in said.splitlines())


def test_unknown_overrides_are_refused(refused: Refused) -> None:
    assert "did you mean steps?" in refused("run", "tiny.yaml", "stages.words.train.step=3")
    assert "is not an override" in refused("run", "tiny.yaml", "steps")


@pytest.mark.parametrize("verb", ["run", "doctor"])
def test_values_may_stand_among_flags(verb: str) -> None:
    values, flags = ["seed=1", "name=a", "seed=2"], ["--devices", "3"] if verb == "run" else []
    switch = ["--dry-run"] if verb == "run" else []
    for words in (
        ["tiny.yaml", *values, *switch, *flags],
        ["tiny.yaml", *switch, values[0], *flags, *values[1:]],
        [*switch, "tiny.yaml", values[0], *flags, *values[1:]],
        [*flags, *switch, "tiny.yaml", *values],
        ["tiny.yaml", *flags, *values, *switch],
    ):
        args = parse([verb, *words])
        assert (args.recipe, args.overrides) == ("tiny.yaml", values), words
        if switch:
            assert (args.dry_run, args.devices) == (True, 3), words
    assert parse(["demo", "a", "--port", "80", "b"]).models == ["a", "b"]


def test_values_may_stand_behind_what_a_comparison_varies() -> None:
    args = parse(["compare", "tiny.yaml", "seed=1", "--vary", "tower=a,b", "name=a", "--jobs", "2"])
    assert (args.overrides, args.vary) == (["seed=1", "name=a"], ["tower=a,b"])


def test_mistakes_among_flags_are_one_line(refused: Refused) -> None:
    said = refused("run", "tiny.yaml", "--dry-run", "stages.words.train.step=3")
    assert "did you mean steps?" in said
    assert "is not an override" in refused("run", "tiny.yaml", "--dry-run", "steps")
    said = refused("run", "tiny.yaml", "--dry-run", "seed=1", "--device", "2")
    assert said == "aimv2-mllm: unrecognized arguments: --device 2; see aimv2-mllm --help\n"
    assert "arguments: c.png" in refused("sample", "m", "b.png", "--seed", "1", "c.png")


BAD_PICTURES = {
    "letter.png": (b"Dear reader", "is not a picture"),
    "cut.png": (cut_png(), "damaged or cut off"),
    "cut.jpg": (cut_jpeg(), "damaged or cut off"),
    "huge.png": (png_header(30_000, 30_000), "64,000,000"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_refused(refused: Refused, here: Path, name: str) -> None:
    content, why = BAD_PICTURES[name]
    (here / name).write_bytes(content)
    model = model_folder(here / "m", "tune")
    for prompt in ([], ["--prompt", "what is it"]):
        assert why in refused("chat", model, "--image", name, *prompt)


def test_a_name_that_is_too_long_is_refused_like_any_other(refused: Refused) -> None:
    name = "long" * 100
    assert "there is no such folder" in refused("sample", name, "out.png")
    assert "cannot be read (File name too long)" in refused("chat", "m", "--image", name)


def test_chat_without_a_picture_says_how_to_get_one(refused: Refused) -> None:
    said = refused("chat", "runs/x")
    assert said.endswith("aimv2_mllm sample runs/x sheet.png\n")


def test_chat_refuses_folders_that_cannot_talk(refused: Refused, here: Path) -> None:
    picture = ("--image", "sheet.png", "--prompt", "what is it")
    assert "absent: there is no such folder" in refused("chat", "absent", *picture)
    assert "is no model and no run" in refused("chat", str(here), *picture)
    said = refused("chat", model_folder(here / "eyes", "pretrain"), *picture)
    assert "is an encoder, which cannot talk; give" in said
    said = refused("chat", model_folder(here / "llm", "language"), *picture)
    assert "is an LLM, which has no eyes; give" in said
    assert "--prompt is empty" in refused("chat", "absent", "--image", "sheet.png", "--prompt", " ")


def test_sample_writes_the_held_out_sheet_of_its_seed(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_folder(here / "m", "tune")
    assert cli.main(["sample", model, "out.png", "--seed", "7", "--size", "56"]) == 0
    scene = scenes.scene(7, "heldout", 0)
    expected = f"what is on it: {scenes.caption(scene)} (--seed 7)\n"
    assert capsys.readouterr() == ("out.png\n", expected)
    with Image.open("out.png") as picture:
        assert picture.tobytes() == scenes.render(scene, 56).tobytes()
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


def test_sample_without_a_seed_is_another_each_time_and_names_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"sources": [{"kind": "handwriting"}]}
    (here / "recipe.yaml").write_text(json.dumps({"stages": {"a": {"kind": "tune", "data": data}}}))
    said = []
    for _ in range(2):
        assert cli.main(["sample", str(here), "sheet.png"]) == 0  # replaces the old one
        said.append(capsys.readouterr().err)
    seeds = [re.search(r"\(--seed (\d+)\)\n$", text) for text in said]
    assert seeds[0]
    assert seeds[1]
    assert seeds[0][1] != seeds[1][1]
    with Image.open("sheet.png") as picture:
        assert picture.size == (336, 336)
        assert picture.tobytes() == (
            scenes.render(scenes.scene(int(seeds[1][1]), "heldout", 0), 336).tobytes()
        )


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("m", "m: is a folder"),
        ("sheet", "its ending is no picture's; give .png"),
        ("sheet.pdf", "its ending is no picture's"),
        ("nowhere/sheet.png", "there is no folder nowhere; make it first"),
        ("long" * 100 + ".png", "cannot be written (File name too long)"),
    ],
)
def test_sample_refuses_where_it_cannot_write(
    refused: Refused, here: Path, out: str, why: str
) -> None:
    assert why in refused("sample", model_folder(here / "m", "align"), out)


def test_a_full_disk_leaves_the_old_sheet(
    refused: Refused, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: Image.Image, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    old = (here / "sheet.png").read_bytes()
    monkeypatch.setattr(Image.Image, "save", fill)
    said = refused("sample", model_folder(here / "m", "align"), "sheet.png")
    assert said == "aimv2-mllm: sheet.png: cannot be written (No space left on device)\n"
    assert (here / "sheet.png").read_bytes() == old


def test_sample_refuses_models_of_another_world(refused: Refused, here: Path) -> None:
    said = refused("sample", model_folder(here / "m", "tune", "photographs"), "out.png")
    assert "were trained on photographs; sheets are for models trained on handwriting" in said
    (here / "stock").mkdir()
    (here / "stock" / "config.json").write_text("{}")
    assert "its stages are not known" in refused("sample", "stock", "out.png")


@pytest.mark.parametrize("way", [["--share"], ["--host", "0.0.0.0"], ["--host", "192.168.0.7"]])
def test_a_demo_for_others_wants_a_login_or_that_none_is_meant(
    refused: Refused, way: list[str]
) -> None:
    said = refused("demo", "anything", *way)
    assert f"{' '.join(way)} lets everybody in who finds it: give --login FILE" in said
    assert "or --no-login if that is meant" in said
    assert "not allowed with" in refused("demo", *way, "--no-login", "--login", "users.txt")


@pytest.mark.parametrize("way", [[], ["--host", "localhost"], ["--share", "--no-login"]])
def test_a_demo_for_oneself_wants_none(refused: Refused, way: list[str]) -> None:
    said = refused("demo", "nowhere", *way)
    assert "login" not in said
    assert "nowhere" in said


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (b"", "each of its lines must be NAME:PASSWORD"),
        (b"ada:secret\nbob\n", "each of its lines must be NAME:PASSWORD"),
        (b":secret\n", "each of its lines must be NAME:PASSWORD"),
        (b"ada:\n", "each of its lines must be NAME:PASSWORD"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_mistakes_in_a_login_file_are_said_but_no_password(
    refused: Refused, here: Path, lines: bytes | None, why: str
) -> None:
    if lines is not None:
        (here / "users.txt").write_bytes(lines)
    said = refused("demo", "nowhere", "--login", "users.txt")
    assert said.startswith("aimv2-mllm: --login users.txt: ")
    assert why in said
    assert "secret" not in said


def test_run_ends_with_the_report_and_what_to_type_next(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from aimv2_mllm.runs import run

    def pretend(recipe: object, narrate: Callable[[str], None]) -> Path:
        narrate("stage zip: done")
        (here / "my run").mkdir(exist_ok=True)
        (here / "my run" / "report.md").write_text("")
        return Path("my run")

    monkeypatch.setattr(run, "run", pretend)
    assert cli.main(["run", "tiny.yaml", "seed=3"]) == 0
    assert capsys.readouterr() == ("report: my run/report.md\n", "stage zip: done\n")
    train = "train: {steps: 2, batch_size: 2, lr: 1e-3}"
    (here / "align.yaml").write_text(
        f"name: a\nstages: {{zip: {{kind: align, tower: ./t, llm: tiny_llm, {train}}}}}\n"
    )
    monkeypatch.setattr(sys, "argv", [".venv/bin/aimv2-mllm", "run", "align.yaml"])
    assert cli.main(["run", "align.yaml"]) == 0
    assert capsys.readouterr().out == (
        "report: my run/report.md\n"
        "next:   .venv/bin/aimv2-mllm sample 'my run' 'my run/sheet.png'\n"
        "        .venv/bin/aimv2-mllm chat 'my run' --image 'my run/sheet.png'\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RunFailed("the loss is not finite"), 1, "aimv2-mllm: the loss is not finite\n"),
        (KeyboardInterrupt(), 130, "aimv2-mllm: interrupted\n"),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            2,
            "aimv2-mllm: No module named 'peft': pip install 'aimv2-mllm[train]'\n",
        ),
        (
            ImportError("scikit-learn is needed: pip install 'aimv2-mllm[train]'"),
            2,
            "aimv2-mllm: scikit-learn is needed: pip install 'aimv2-mllm[train]'\n",
        ),
    ],
)
def test_each_end_has_its_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setitem(cli.VERBS, "run", fail)
    assert cli.main(["run", "x"]) == code
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize(
    "error", [SystemExit(143), ZeroDivisionError("a bug"), ImportError("a bug", name="aimv2_mllm")]
)
def test_a_bug_and_a_signal_pass(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setitem(cli.VERBS, "run", fail)
    with pytest.raises(type(error)):
        cli.main(["run", "x"])


def test_output_that_nobody_reads_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)  # what is not flushed is the trap
    code = "import sys, aimv2_mllm.__main__ as c\nc.VERBS['run'] = lambda _: print('x')\n"
    command = [sys.executable, "-c", f"{code}sys.exit(c.main(['run', 'x']))"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_version_is_the_installed_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 1.2.3")
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "aimv2-mllm 1.2.3\n"
    assert aimv2_mllm.__version__ == "aimv2-mllm 1.2.3"
