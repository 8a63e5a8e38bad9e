"""The verb `evaluate`: models of ours and of others asked, killed, judged, reported."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from PIL import Image
from test_chat import llava as llava_of_chat
from test_chat import run_folder

from aimv2_mllm import __main__ as cli
from aimv2_mllm.comparison.evaluate import evaluate as judged
from aimv2_mllm.data.questions.asked import Question
from aimv2_mllm.data.talks.tokenizer import train_tokenizer
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation import answerers
from aimv2_mllm.evaluation.answerers import Foreign, Ours, load_answerer
from aimv2_mllm.evaluation.questions import Questions, prompt_of
from aimv2_mllm.model.sampling import Sampling
from aimv2_mllm.runs.run_folder import locked

WORDS = ["what is it", "where is the red one", "is it the one", "what is the red"]
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PINPOINTS = [[28, 56], [56, 28]]
llava = llava_of_chat  # a fixture: the folder of a tiny Llava of ours


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LlavaNext with random weights: a model that is not ours."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([" what is it and where is the red one"] * 3, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {**SMALL, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    config = T.LlavaNextConfig(
        vision_config=T.CLIPVisionConfig(**SMALL, patch_size=7, image_size=28),
        text_config=T.LlamaConfig(**text, initializer_range=0.5),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    pictures = T.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = T.LlavaNextProcessor(
        pictures,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    folder = tmp_path_factory.mktemp("next")
    T.LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a file with seven questions about three pictures, in the folder where one is."""
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        noise = Image.effect_noise((28, 28 + 7 * number), 90)
        Image.merge("RGB", [noise] * 3).save(f"{number}.png")
    rows = [
        {"image": f"{n % 3}.png", "question": WORDS[n % 4], "answer": "it", "type": f"t{n % 2}"}
        for n in range(7)
    ]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "q.jsonl"


def evaluate(model: object, data: str, *words: str) -> int:
    return cli.main(["evaluate", str(model), data, "--max-new-tokens", "6", *words])


def files(folder: str) -> dict[str, bytes]:
    """What is in a folder, but for the index of a JSON file."""
    found = (
        path for path in Path(folder).iterdir() if not path.name.endswith(".index.safetensors")
    )
    return {path.name: path.read_bytes() for path in found}


def results(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "results.jsonl").read_text().splitlines()]


def test_a_model_is_judged_with_its_controls(
    llava: Path,
    data: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(llava, data, "--out", "out") == 0
    table = capsys.readouterr().out
    assert f"data     {data}: 7 questions" in table
    for row in ("all", "  t0", "no picture", "another question's picture", "what the right pictu"):
        assert f"\n{row}" in table
    assert table.endswith("\nreport: out/report.md\n")
    found, told = results("out"), json.loads((Path("out") / "summary.json").read_text())
    assert [line["question"] for line in found] == [WORDS[n % 4] for n in range(7)]
    pictures = [hashlib.sha256(Path(f"{n % 3}.png").read_bytes()).hexdigest() for n in range(7)]
    assert [line["picture"] for line in found] == pictures
    for name in ("text_only", "blind", "majority"):
        scores = [line[name]["score"] for line in found]
        assert told["controls"][name]["score"] == sum(scores) / 7
    assert told["controls"]["majority"]["score"] == 1
    bot = Ours(llava)
    shown = [Image.open(f"{n % 3}.png") for n in range(7)]
    for line, picture, blind in zip(found, shown, [*shown[1:], shown[1]], strict=True):
        assert line["seen"]["answer"] == bot([(line["question"], picture)], 6)[0]
        assert line["blind"]["answer"] == bot([(line["question"], blind)], 6)[0]
    assert len({line["seen"]["answer"] for line in found}) > 2  # so pictures and words matter
    page = (Path("out") / "report.html").read_text()
    assert page.count("<article") == 6  # wrong ones, no more than are shown
    assert "What the features know" not in page
    for text in (page, (Path("out") / "report.md").read_text()):
        for control in ("without any picture.", "with another question's picture.", "No model: "):
            assert text.replace("&#39;", "'").count(control) == 1
    for picture in ("types.png", "incorrectly-1.png"):
        assert picture in (Path("out") / "report.md").read_text()
        Image.open(Path("out") / picture).verify()


def test_what_is_asked_in_python_gives_the_same_files(llava: Path, data: str) -> None:
    assert evaluate(llava, data, "--out", "out", "--limit", "5") == 0
    asked = Questions(data, limit=5, max_new_tokens=6)
    numbers = judged(str(llava), asked, Path("again"))
    assert numbers["command"].endswith(" --limit 5 --batch-size 8 --max-new-tokens 6 --out again")
    first, again = files("out"), files("again")
    assert first.keys() == again.keys()
    assert {name for name in first if first[name] != again[name]} == {
        name
        for name in first
        if name.startswith(("report", "summary"))  # they name the folder
    }


def interrupted_after(count: int) -> Callable[..., list[str]]:
    real, calls = Ours.__call__, list[int]()

    def call(self: Ours, asked: Any, max_new_tokens: int) -> list[str]:
        calls.append(1)
        if len(calls) > count:
            raise KeyboardInterrupt
        return real(self, asked, max_new_tokens)

    return call


def test_a_killed_evaluation_goes_on_to_the_same_files(
    llava: Path,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert evaluate(llava, data, "--out", "out", "--batch-size", "2") == 0
    whole = files("out")
    shutil.rmtree("out")
    for count in (1, 4, 0):
        with monkeypatch.context() as patch:
            patch.setattr(Ours, "__call__", interrupted_after(count))
            assert evaluate(llava, data, "--out", "out", "--batch-size", "2") == 130
        assert not (Path("out") / "summary.json").exists()
    assert evaluate(llava, data, "--out", "out", "--batch-size", "2") == 0
    assert files("out") == whole


def test_another_metric_asks_nothing_again(
    llava: Path,
    data: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert evaluate(llava, data, "--out", "out") == 0
    monkeypatch.setattr(Ours, "__call__", lambda *_: pytest.fail("asked again"))
    assert evaluate(llava, data, "--out", "out", "--metric", "anls") == 0
    assert json.loads((Path("out") / "summary.json").read_text())["metric"] == "anls"


def test_a_folder_of_another_model_is_not_taken(
    llava: Path,
    data: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(llava, data, "--out", "out", "--no-controls") == 0
    copy = shutil.copytree(llava, "copy")
    config = json.loads((Path(copy) / "config.json").read_text())
    (Path(copy) / "config.json").write_text(json.dumps(config, indent=1))
    before = files("out")
    assert evaluate(copy, data, "--out", "out") == 2
    assert evaluate(llava, data, "--out", "out", "--prompt", "{question}?") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "out: holds the answers of another evaluation, which differs in model; give" in first
    assert "which differs in questions" in second
    assert files("out") == before


def test_other_pictures_of_the_same_names_are_another_evaluation(
    llava: Path,
    data: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("dark").mkdir()
    for number in range(3):
        Image.open(f"{number}.png").point(lambda value: value // 2).save(f"dark/{number}.png")
    assert evaluate(llava, data, "--out", "out", "--no-controls") == 0
    assert evaluate(llava, data, "--out", "out", "--no-controls", "--root", "dark") == 2
    assert "another evaluation, which differs in questions; give" in capsys.readouterr().err
    shutil.copy("dark/0.png", "0.png")
    assert evaluate(llava, data, "--out", "out", "--no-controls") == 2
    assert "another evaluation, which differs in questions; give" in capsys.readouterr().err


def test_a_folder_in_which_another_process_asks_is_not_taken(
    llava: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(Path("out")):
        assert evaluate(llava, data, "--out", "out", "--no-controls") == 2
    said = "out: another process is running there; wait for it or give another --out\n"
    assert capsys.readouterr().err.endswith(said)
    assert evaluate(llava, data, "--out", "out", "--no-controls") == 0


def test_a_run_is_asked_by_its_last_stage(llava: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", llava, eyes="pretrain", again="tune")
    assert isinstance(load_answerer(str(run)), Ours)


def test_batches_of_another_model_are_answered_as_one_by_one(other: Path) -> None:
    model = load_answerer(str(other))
    assert isinstance(model, Foreign)
    noise = Image.effect_noise((40, 30), 90).convert("RGB")
    asked = [(WORDS[0], noise), (WORDS[1], None), (WORDS[1], Image.new("RGB", (30, 60), "red"))]
    together = model(asked, 8)
    assert together == [model([one], 8)[0] for one in asked]
    assert len(set(together)) == 3
    assert model([], 8) == []


def test_another_model_draws_as_it_is_told(other: Path) -> None:
    model, talk = load_answerer(str(other)), answerers.talk_of(WORDS[0], None)

    def said(**words: Any) -> str:
        [text] = model.reply([talk], 12, Sampling(**words))
        return text

    drawn = [said(temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert said(repetition_penalty=5.0) != said()
    torch.manual_seed(1)
    said(temperature=1.0, seed=3)
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == after  # others draw as if nothing had been drawn


def test_another_model_is_one_more_row(
    other: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(other, data, "--out", "out") == 0
    assert "another question's picture" in capsys.readouterr().out
    assert len(results("out")) == 7


def test_a_stock_llava_answers_others_processors_as_ours(llava: Path) -> None:
    square = Image.effect_noise((28, 28), 90).convert("RGB")
    asked = [(text, square) for text in WORDS]
    assert Foreign(str(llava))(asked, 8) == Ours(llava)(asked, 8)


def test_a_model_that_refuses_is_said_in_one_line(
    other: Path, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Any, talks: Any, **_: Any) -> None:
        if any(part["type"] == kind for talk in talks for part in talk[0]["content"]):
            raise ValueError("Cannot use\nthis")

    monkeypatch.setattr(T.LlavaNextProcessor, "apply_chat_template", refuse)
    kind = "image"
    assert evaluate(other, data, "--out", "out") == 2
    said = f"the first: question 0: {other}: refuses a picture (Cannot use this)\n"
    err = capsys.readouterr().err
    assert "7 of 7 questions cannot be asked, and 5% are the most; " in err
    assert err.endswith(said)


def test_a_question_that_cannot_be_asked_ends_nothing(
    llava: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = Ours(llava).bot.processor.tokenizer.eos_token
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()] * 3
    rows[20] = {**rows[20], "question": f"what is {mark}"}
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(llava, data, "--out", "out") == 0
    table = capsys.readouterr().out
    said = "3 could not be asked and count as wrong"  # once with its picture, and in two controls
    assert f"21 questions; {said}, the first: question 20, seen: " in table
    assert results("out")[20]["seen"] == {"answer": "", "score": 0.0}
    for name in ("report.md", "report.html"):
        assert said in (Path("out") / name).read_text()


def test_the_report_has_f1_of_every_type(llava: Path, data: str) -> None:
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    lines = [json.dumps({**row, "answer": "yes" if n % 3 else "no"}) for n, row in enumerate(rows)]
    Path(data).write_text("\n".join(lines) + "\n")
    assert evaluate(llava, data, "--out", "out", "--metric", "yesno", "--no-controls") == 0
    told = json.loads((Path("out") / "summary.json").read_text())
    report = (Path("out") / "report.md").read_text().splitlines()
    head = next(line for line in report if line.startswith("| type |")).split(" | ")
    for kind, one in told["by_type"].items():
        row = next(line for line in report if line.startswith(f"| {kind} |")).split(" | ")
        assert row[head.index("F1 of yes")] == f"{100 * one['f1']:.1f}"
        assert len(row) == len(head)


def test_answers_that_have_too_little_room_are_counted(
    llava: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = Ours(llava).bot.limit
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    rows[2]["question"] = "what " * (limit - 20)
    Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(llava, data, "--out", "out", "--no-controls", "--max-new-tokens", "30") == 0
    said = "1 questions, those of controls too, left fewer than --max-new-tokens 30 of the model's"
    assert f"{said} {limit} tokens" in capsys.readouterr().err


def test_a_model_that_needs_a_picture_is_asked_without_controls(
    other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("needs images")

    monkeypatch.setattr(T.LlavaNextProcessor, "apply_chat_template", refuse)
    with pytest.raises(UsageError, match=r"a question without a picture .*; give --no-controls$"):
        load_answerer(str(other))([("?", None)], 4)


def test_what_is_no_model_is_refused(other: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such folder; give a run folder"):
        load_answerer(str(tmp_path / "absent"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; give a run folder"):
        load_answerer(str(tmp_path / "file"))
    llm = T.LlamaForCausalLM(T.LlamaConfig(**SMALL, vocab_size=50))
    llm.save_pretrained(tmp_path / "llm")
    with pytest.raises(UsageError, match="no image-text model can be loaded from there"):
        load_answerer(str(tmp_path / "llm"))
    mute = Path(shutil.copytree(other, tmp_path / "mute"))
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="has no chat template, so nobody knows how to ask it"):
        load_answerer(str(mute))
    with (mute / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UsageError, match="are damaged or cut off"):
        load_answerer(str(mute))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--metric", "vqa"], "q.jsonl: question 0 has 1 answers, and VQA accuracy compares"),
        (["--metric", "yesno"], "question 0 has the answer it, and yesno is for answers that are"),
        (["--metric", "choice"], "question 0 has the answer it, which is none of its choices"),
        (["--metric", "bleu"], "invalid choice: 'bleu'"),
        (["--prompt", "Answer!"], "--prompt 'Answer!': has no {question} where the question comes"),
        (["--column", "answer=x"], "must be FIELD=NAME, where FIELD is one of image, question, an"),
        (["--column", "answers"], "--column answers: must be FIELD=NAME"),
        (["--column", "answers=label"], "has no field label (answers); its first row has image"),
        (["--limit", "0"], "--limit: is 0, must be a whole number"),
        (["--out", "q.jsonl"], "q.jsonl: cannot be the folder of results (File exists); "),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_asked(
    data: str, words: list[str], why: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    class Silent:
        identity = "none"

        def __call__(self, *_: Any) -> list[str]:
            raise AssertionError("asked")

    monkeypatch.setattr("aimv2_mllm.comparison.evaluate.load_answerer", lambda _: Silent())
    before = files(".")
    assert evaluate("model", data, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert why in err
    assert err.count("\n") == 1
    assert files(".") == before


def test_a_question_is_put_as_the_prompt_says() -> None:
    plain = Question("1", "What is it?", ("red",))
    assert prompt_of(plain, None) == "What is it?"
    assert prompt_of(plain, "{question} Briefly.") == "What is it? Briefly."
    choice = Question("1", "Which?", ("B",), choices=("cat", "dog"))
    assert prompt_of(choice, None) == (
        "Which?\nA. cat\nB. dog\nAnswer with the letter of the right choice."
    )
    assert prompt_of(choice, "{choices}: {question}") == "A. cat\nB. dog: Which?"


def test_another_model_holds_conversations_about_several_pictures(other: Path) -> None:
    model = load_answerer(str(other))
    noise, red = Image.effect_noise((40, 30), 90).convert("RGB"), Image.new("RGB", (30, 60), "red")
    parts = [{"type": "text", "text": WORDS[0]}, {"type": "image"}, {"type": "image"}]
    messages = [{"role": "user", "content": parts}]
    [first], [other_way] = (
        model.reply([(messages, pictures)], 8) for pictures in ([noise, red], [red, noise])
    )
    assert first != other_way
    stop = first[2:4]
    assert model.reply([(messages, [noise, red])], 8, Sampling(stop=(stop,))) == [
        first[: first.index(stop)].strip()
    ]
    drawn = {model.reply([(messages, [noise, red])], 8, Sampling(2.0))[0] for _ in range(4)}
    assert len(drawn) > 1


def test_small_files_tell_models_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = answerers.digest(tmp_path)
    assert before == answerers.digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert before != answerers.digest(tmp_path)
