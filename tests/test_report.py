"""The report of a finished run: its numbers, its page, and that it is whole or not there."""

import json
import os
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import RECIPES
from PIL import Image
from test_session import tower_counted

from aimv2_mllm.chat.chat import load_model
from aimv2_mllm.chat.chatbot import Chatbot, prompt_of
from aimv2_mllm.chat.prompts import said
from aimv2_mllm.data.handwriting import held_out, scenes
from aimv2_mllm.errors import RunFailed
from aimv2_mllm.evaluation import answers, summary
from aimv2_mllm.evaluation.answerers import Ours
from aimv2_mllm.model import encoder
from aimv2_mllm.model.llms import load_llm, load_tokenizer
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.file import load_recipe
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.recipe.stages import AlignStage
from aimv2_mllm.reports import page, report
from aimv2_mllm.runs.run import run
from aimv2_mllm.stages import llms

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TRAIN = {"steps": 2, "batch_size": 4, "lr": 1e-3, "log_every": 1}
QUESTIONS, SHEETS = 15, 2  # 15: the last sheet is asked one question only
BY_KIND = (
    "vqa_accuracy_by_kind", "vqa_blind_by_kind", "vqa_text_only_by_kind", "vqa_majority_by_kind",
)  # fmt: skip
KEYS = {
    "num_questions", "vqa_accuracy", "vqa_accuracy_interval", "vqa_accuracy_blind",
    "vqa_accuracy_text_only",
    "vqa_accuracy_majority", *BY_KIND, "caption_exact", "caption_loss", "pixel_loss",
    "pixel_loss_flat", "digit_knn_accuracy", "digit_knn_accuracy_untrained",
    "digit_knn_accuracy_pixels", "digit_linear_accuracy", "digit_linear_accuracy_untrained",
    "parameters", "stage_parameters", "seconds", "versions", "made_from",
}  # fmt: skip


def recipe(folder: Path, names: tuple[str, ...] = ("llm", "see", "align")) -> Recipe:
    every = {
        "llm": {
            "kind": "language",
            "vocab_size": 300,
            "model": {**TINY, "num_key_value_heads": 2, "max_position_embeddings": 500},
            "train": TRAIN,
        },
        "see": {
            "kind": "pretrain",
            "tokenizer": "llm" if "llm" in names else "tiny_llm",
            "encoder": {"size": "aimv2_nano", "image_size": 28},
            "decoder": {**TINY, "max_text_tokens": 40},
            "train": TRAIN,
        },
        "align": {"kind": "align", "tower": "see", "llm": "llm", "train": TRAIN},
    }
    return Recipe.model_validate(
        {
            "name": "tiny_run",
            "output": folder,
            "stages": {name: every[name] for name in names},
            "evaluation": {"questions": QUESTIONS, "sheets": SHEETS, "seed": 5},
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run of three tiny stages with its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(encoder.SIZES, "aimv2_nano", TINY)
        patch.setattr(llms, "TOKENIZER_TEXTS", 30)
        folder = tmp_path_factory.mktemp("run")
        place = Place(recipe(folder), folder)
        run(place.recipe, lambda line: None)
    return place


@pytest.fixture(scope="module")
def findings(finished: Place) -> summary.Findings:
    return summary.evaluate(finished, lambda line: None)


@pytest.fixture
def place(finished: Place, tmp_path: Path) -> Place:
    """The finished run's stages in a folder of their own, without a report."""
    for name in finished.recipe.stages:
        (tmp_path / name).symlink_to(finished.folder / name)
    return Place(finished.recipe, tmp_path)


def numbers(place: Place) -> dict:
    return json.loads((place.folder / "summary.json").read_text())


def report_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.is_dir())


def test_the_summary_has_every_number(finished: Place) -> None:
    found = numbers(finished)
    assert set(found) == KEYS
    assert found["num_questions"] == QUESTIONS
    assert all(set(found[key]) == set(scenes.QUESTIONS) for key in BY_KIND)
    assert set(found["seconds"]) == {"llm", "see", "align", "evaluation"}
    assert found["parameters"]["total"] > found["parameters"]["LLM"] > 0
    low, high = found["vqa_accuracy_interval"]
    assert 0 <= low <= found["vqa_accuracy"] <= high <= 1


def test_a_tokenizer_made_here_says_what_its_llm_has_room_for(finished: Place) -> None:
    for stage in ("llm", "align"):
        text = (finished.result(stage) / "tokenizer_config.json").read_text()
        assert json.loads(text)["model_max_length"] == 500


def with_stage(place: Place, stage: str, **values: Any) -> Place:
    """The same with other values in one stage."""
    plain = place.recipe.model_dump()
    plain["stages"][stage] |= values
    return Place(Recipe.model_validate(plain), place.folder)


def test_the_report_speaks_of_the_models_that_the_recipe_names(tmp_path: Path) -> None:
    place = Place(recipe(tmp_path), tmp_path)
    assert "An AIMv2 vision encoder, pre-trained by" in page._about(place)
    other = with_stage(place, "align", tower="google/siglip-base")
    assert "The vision tower google/siglip-base became the eyes" in page._about(other)
    assert "AIMv2" not in page._about(other)
    see = Place(recipe(tmp_path, ("see",)), tmp_path)
    assert "from random weights" in page._about(see)
    later = with_stage(see, "see", start={"encoder": "./before"})
    assert "pre-trained here from ./before:" in page._about(later)


def test_what_to_type_next_works_from_anywhere_and_for_this_model(tmp_path: Path) -> None:
    place = Place(recipe(tmp_path), tmp_path)
    sample, chat = (one["line"] for one in page._next(place))
    assert (sample, chat) == (
        f"aimv2-mllm sample {tmp_path} sheet.png",
        f"aimv2-mllm chat {tmp_path} --image sheet.png",
    )
    data = {"sources": [{"kind": "questions", "folder": "photos"}]}
    [chat] = (one["line"] for one in page._next(with_stage(place, "align", data=data)))
    assert chat == f"aimv2-mllm chat {tmp_path} --image PICTURE"
    [run_next] = (one["line"] for one in page._next(Place(recipe(tmp_path, ("see",)), tmp_path)))
    _, _, name, *words = shlex.split(run_next)
    stage = load_recipe(RECIPES.parent / name, words).stages["align"]
    assert isinstance(stage, AlignStage)
    assert stage.tower == f"{tmp_path}/see/model"


def test_the_same_result_gives_the_same_summary_but_for_its_seconds(
    finished: Place, findings: summary.Findings
) -> None:
    again, before = json.loads(json.dumps(findings.numbers)), numbers(finished)
    assert {key: before[key] for key in again if key != "seconds"} == {
        key: value for key, value in again.items() if key != "seconds"
    }


def test_a_finished_run_is_not_judged_again(
    finished: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "evaluate", lambda *_: pytest.fail("judged again"))
    said: list[str] = []
    report.write_report(finished, said.append)
    assert [line for line in said if line.startswith("report: finished")] == said != []


def test_a_finished_run_that_is_to_be_asked_more_is_only_judged_anew(
    place: Place, findings: summary.Findings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "evaluate", lambda where, _: judged.append(where) or findings)
    judged: list[Place] = []
    for questions in (QUESTIONS, QUESTIONS, QUESTIONS + 1):
        asked = place.recipe.evaluation.model_copy(update={"questions": questions})
        words = {"output": place.folder, "evaluation": asked}
        said: list[str] = []
        run(place.recipe.model_copy(update=words), said.append)
        assert [line for line in said if ": training" in line] == []
    assert [one.recipe.evaluation.questions for one in judged] == [QUESTIONS, QUESTIONS + 1]
    assert numbers(place)["made_from"]["evaluation"]["questions"] == QUESTIONS + 1


@pytest.mark.parametrize("change", ["no summary", "no page", "questions", "result", "cut off"])
def test_a_run_is_judged_again_when_what_it_was_judged_by_changed(
    finished: Place, findings: summary.Findings, place: Place, change: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls = []
    monkeypatch.setattr(report, "evaluate", lambda *_: calls.append(1) or findings)
    report.write_report(place, lambda line: None)
    report.write_report(place, lambda line: None)
    assert len(calls) == 1
    if change == "no summary":
        (place.folder / "summary.json").unlink()
    elif change == "no page":
        (place.folder / "report.html").unlink()
    elif change == "cut off":
        (place.folder / "summary.json").write_text('{"num_')
    elif change == "questions":
        config = place.recipe.evaluation.model_copy(update={"questions": 8})
        place = Place(place.recipe.model_copy(update={"evaluation": config}), place.folder)
    else:
        real = Place.record
        monkeypatch.setattr(Place, "record", lambda p, s: {**real(p, s), "files": {"x": s}})
    report.write_report(place, lambda line: None)
    assert len(calls) == 2


class Page(HTMLParser):
    """Checks that tags are balanced; keeps the addresses, alternative texts and tables."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_the_page_needs_nothing_from_outside(finished: Place) -> None:
    text = (finished.folder / "report.html").read_text()
    page = parsed(text)
    addresses = [
        attrs[key] for _, attrs in page.seen for key in ("src", "srcset", "href") if key in attrs
    ]
    assert addresses
    assert all(a.startswith("data:image/png;base64,") for a in addresses)
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)


def test_the_page_can_be_read_without_eyes(finished: Place) -> None:
    page = parsed((finished.folder / "report.html").read_text())
    tags = [tag for tag, _ in page.seen]
    assert tags.count("table") == tags.count("caption") > 2
    assert all(attrs.get("alt") for tag, attrs in page.seen if tag == "img")
    assert ("html", {"lang": "en"}) in page.seen
    assert tags.count("h1") == 1


def test_whatever_a_model_says_is_text_on_the_page(
    findings: summary.Findings, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "<script>alert(1)</script>|**x** $x_"
    given = [evil] * len(findings.given)
    paintings = [summary.Painting(*[*vars(p).values()][:-1], evil) for p in findings.paintings]
    spoken = summary.Findings({**findings.numbers}, findings.asked, given, paintings)
    monkeypatch.setattr(report, "evaluate", lambda *_: spoken)
    report.write_report(place, lambda line: None)
    text = (place.folder / "report.html").read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") > SHEETS
    parsed(text)
    markdown = (place.folder / "report.md").read_text()
    assert "<script" not in markdown
    assert "\\|\\*\\*x\\*\\*" in markdown


def test_the_markdown_shows_pictures_that_lie_beside_it(finished: Place) -> None:
    text = (finished.folder / "report.md").read_text()
    names = re.findall(r"\]\(([^)]+)\)", text)
    assert "sheets.png" in names
    assert "accuracy.png" in names
    assert "loss-see.png" in names
    for name in names:
        assert (finished.folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("failing", ["report.md", "summary.json"])
def test_a_report_that_cannot_be_written_leaves_nothing(
    findings: summary.Findings, place: Place, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "evaluate", lambda *_: findings)
    real = Path.open

    def full(path: Path, *args, **kwargs):
        if path.name == failing and args == ("wb",):
            raise OSError(28, "No space left on device")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunFailed, match="No space left"):
        report.write_report(place, lambda line: None)
    assert report_files(place.folder) == []
    assert sorted(path.name for path in place.folder.iterdir()) == ["align", "llm", "see"]


def test_a_report_that_was_there_outlives_a_failed_one(
    findings: summary.Findings, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "evaluate", lambda *_: findings)
    report.write_report(place, lambda line: None)
    before = {name: (place.folder / name).read_bytes() for name in report_files(place.folder)}
    config = place.recipe.evaluation.model_copy(update={"questions": 8})
    other = Place(place.recipe.model_copy(update={"evaluation": config}), place.folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed):
        report.write_report(other, lambda line: None)
    after = {name: (place.folder / name).read_bytes() for name in report_files(place.folder)}
    assert after == before


def sheet_of(picture: Image.Image) -> int:
    """The held-out sheet that it shows."""
    sheets = (held_out.held_out_sheet(5, index) for index in range(4))
    pixels = [scenes.render(sheet, picture.width).tobytes() for sheet in sheets]
    return pixels.index(picture.tobytes())


def test_blind_questions_are_the_same_about_other_sheets(
    finished: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def ask(bot, asked, seen, **_):
        texts, pictures = zip(*asked, strict=True)
        calls.append((texts, [one and sheet_of(one) for one in pictures]))
        return ["7"] * len(asked)

    monkeypatch.setattr(answers, "ask", ask)
    bot = load_model(finished.result("align"))
    for count in (QUESTIONS, 3):  # 3: about one sheet alone
        calls.clear()
        found = summary.Findings({}, held_out.held_out_questions(5, count))
        summary._judge_seeing(found, bot, 5)
        _, (texts, about), (blind_texts, elsewhere), (texts_alone, nothing) = calls
        assert texts == blind_texts == texts_alone
        assert set(nothing) == {None}
        assert about == [question.sheet for question in found.asked]
        assert all(here != there for here, there in zip(about, elsewhere, strict=True))


def test_answers_are_those_of_evaluate_and_each_sheet_is_looked_at_once(
    finished: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, told, ask = Ours(finished.result("align")), [], answers.ask
    torch.manual_seed(0)
    for parameter in ours.model.parameters():  # after two steps all answers are alike
        parameter.data += 0.3 * torch.randn_like(parameter)

    def noted(bot, asked, seen, *, max_new_tokens=answers.ANSWER_TOKENS):
        given = ask(bot, asked, seen, max_new_tokens=max_new_tokens)
        told.extend((one, max_new_tokens, text) for one, text in zip(asked, given, strict=True))
        return given

    monkeypatch.setattr(answers, "BATCH_SIZE", 4)
    monkeypatch.setattr(answers, "ask", noted)
    found = summary.Findings({}, held_out.held_out_questions(5, QUESTIONS))
    with tower_counted(ours.bot) as seen:
        summary._judge_seeing(found, ours.bot, 5)
    assert sum(seen) == 3  # sheets
    assert len(told) == 3 + 3 * QUESTIONS
    assert len({text for *_, text in told}) > 6
    for one, most, text in told:
        assert ours([one], most) == [text]


def test_an_llm_alone_is_asked_in_words_and_says_what_it_generates(finished: Place) -> None:
    folder = str(finished.result("llm"))
    llm, tokenizer = load_llm(folder).eval(), load_tokenizer(folder)
    for parameter in llm.parameters():
        parameter.data *= 3
    bot = Chatbot(llm, SimpleNamespace(tokenizer=tokenizer), {})
    texts = ["What is red?", "On the sheet: a red 7. Where is it?", "How many?"]
    given = answers.ask(bot, [(text, None) for text in texts], {})
    for text, said_of_it in zip(texts, given, strict=True):
        ids = torch.tensor([prompt_of(bot, [said("user", text)], [], 9, {}).ids])
        made = llm.generate(ids, do_sample=False, max_new_tokens=answers.ANSWER_TOKENS)
        words = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert said_of_it == words.strip()


@pytest.mark.parametrize(
    ("names", "present", "absent"),
    [
        (("llm",), {"text_accuracy", "text_accuracy_by_kind"}, {"vqa_accuracy", "pixel_loss"}),
        (("llm", "see"), {"pixel_loss", "digit_knn_accuracy"}, {"vqa_accuracy", "text_accuracy"}),
    ],
)
def test_a_run_without_an_mllm_gets_what_applies(
    place: Place, names: tuple[str, ...], present: set[str], absent: set[str]
) -> None:
    place = Place(recipe(place.folder, names), place.folder)
    report.write_report(place, lambda line: None)
    found = numbers(place)
    assert present <= set(found)
    assert not absent & set(found)
    parsed((place.folder / "report.html").read_text())
