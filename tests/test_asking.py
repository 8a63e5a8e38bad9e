"""A model asked everything: what the controls see, and answers that survive a kill."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.questions.asked import Asked, Question
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation.asking import Answers, ask_all, demand_same
from aimv2_mllm.evaluation.intervals import interval
from aimv2_mllm.evaluation.judging import Judged, judge, notes, summary
from aimv2_mllm.evaluation.metrics import METRICS

PICTURES = ["a", "a", "b", "", "c", "b", "c"]  # of the questions, by name; one has none


def asked_about(pictures: Sequence[str], damaged: Sequence[str] = ()) -> Asked:
    """A question about each picture; what a picture is can be told by its width."""
    questions = [
        Question(str(n), f"q{n}", (name or "none",), "odd" if n % 2 else "even", (), name)
        for n, name in enumerate(pictures)
    ]

    def open_picture(number: int) -> Image.Image:
        if pictures[number] in damaged:
            raise Unusable("undecodable", "the picture is damaged")
        return Image.new("RGB", (ord(pictures[number]), 1))

    return Asked(questions, open_picture, [], "digest")


class Model:
    """A model that says which picture it sees, and remembers what it was asked."""

    def __init__(self, most: int = 10**9) -> None:
        self.batches: list[list[str]] = []
        self._most = most

    def __call__(self, batch: Sequence[tuple[str, Image.Image | None]]) -> list[str]:
        if len(self.batches) == self._most:
            raise KeyboardInterrupt
        self.batches.append([text for text, _ in batch])
        return [chr(picture.width) if picture else "none" for _, picture in batch]


def ask(folder: Path, asked: Asked, model: Model, *, controls: bool = True, batch: int = 3) -> None:
    prompts = [question.text for question in asked.questions]
    ask_all(asked, prompts, model, Answers(folder), controls=controls, batch=batch)


def given(folder: Path, name: str) -> list[str | None]:
    return list(Answers(folder).given[name].values())


def test_each_pass_shows_its_picture(tmp_path: Path) -> None:
    ask(tmp_path, asked_about(PICTURES), Model())
    assert given(tmp_path, "seen") == ["a", "a", "b", "none", "c", "b", "c"]
    assert given(tmp_path, "text_only") == ["none"] * 7
    assert given(tmp_path, "blind") == ["b", "b", "c", "none", "a", "c", "a"]


def test_without_controls_each_question_is_asked_once(tmp_path: Path) -> None:
    model = Model()
    ask(tmp_path, asked_about(PICTURES), model, controls=False)
    assert [len(batch) for batch in model.batches] == [3, 3, 1]
    assert given(tmp_path, "blind") == given(tmp_path, "text_only") == []


@pytest.mark.parametrize("done", range(9))
def test_answers_go_on_after_a_kill(tmp_path: Path, done: int) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    model = Model()
    ask(whole, asked_about(PICTURES), model)
    with pytest.raises(KeyboardInterrupt):
        ask(broken, asked_about(PICTURES), Model(done))
    rest = Model()
    ask(broken, asked_about(PICTURES), rest)
    assert rest.batches == model.batches[done:]
    assert (broken / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()


@pytest.mark.parametrize("cut", [1, 20, 60, 100])
def test_a_torn_batch_is_asked_again_as_a_whole(tmp_path: Path, cut: int) -> None:
    ask(tmp_path, asked_about(PICTURES), Model(), controls=False)
    file = tmp_path / "answers.jsonl"
    before = Answers(tmp_path).given
    file.write_bytes(file.read_bytes()[:-cut])
    rest = Model()
    ask(tmp_path, asked_about(PICTURES), rest, controls=False)
    assert rest.batches in ([["q6"]], [["q3", "q4", "q5"], ["q6"]])
    assert Answers(tmp_path).given == before
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_damaged_pictures_are_left_out_of_every_pass(tmp_path: Path) -> None:
    pictures = [*"abcdefghijklmnopqrstuvwxyz"]
    asked = asked_about(pictures, damaged=["b"])
    ask(tmp_path, asked, Model())
    answers = Answers(tmp_path)
    assert answers.unusable == {"1": "the picture is damaged"}
    assert all(found["1"] is None and len(found) == 26 for found in answers.given.values())
    assert answers.given["blind"]["0"] == "c"  # nor is it shown to others
    judged = judge(asked, answers, METRICS["exact"], controls=True)
    assert [question.id for question in judged.questions] == [str(n) for n in range(26) if n != 1]
    assert judged.scores["seen"] == [1.0] * 25
    assert judged.scores["blind"] == [0.0] * 25


def test_too_many_damaged_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"1 of 4 pictures cannot be decoded, .*first: question 1: the pic"
    ):
        ask(tmp_path, asked_about(["a", "b", "c", "b"], damaged=["b"]), Model())


def test_one_picture_has_no_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"about one picture, .*give --no-controls"):
        ask(tmp_path, asked_about(["a", "a", ""]), Model())
    ask(tmp_path, asked_about(["a", "a", ""]), Model(), controls=False)


class Choosy(Model):
    """A model that refuses some questions."""

    def __init__(self, *refused: str) -> None:
        super().__init__()
        self._refused = refused

    def __call__(self, batch: Sequence[tuple[str, Image.Image | None]]) -> list[str]:
        if wrong := [text for text, _ in batch if text in self._refused]:
            raise UsageError(f"{wrong[0]} is too long")
        return super().__call__(batch)


def test_a_question_that_cannot_be_asked_counts_as_answered_wrongly(tmp_path: Path) -> None:
    asked = asked_about([*"abcdefghijklmnopqrstuvwxyz"])
    model = Choosy("q4")
    ask(tmp_path, asked, model)
    assert model.batches[:5] == [["q0", "q1", "q2"], ["q3"], ["q5"], ["q6", "q7", "q8"], [
        "q9", "q10", "q11"]]  # fmt: skip
    rest, answers = Choosy("q4"), Answers(tmp_path)
    ask(tmp_path, asked, rest)
    assert rest.batches == []
    assert answers.given["seen"]["4"] == ""
    assert answers.unusable == {}
    assert answers.not_asked() == [
        f"question 4, {name}: q4 is too long" for name in ("seen", "text_only", "blind")
    ]
    agreed = asked._replace(questions=[replace(one, answers=("yes",)) for one in asked.questions])
    judged = judge(agreed, answers, METRICS["yesno"], controls=True)
    assert judged.scores["seen"] == [float(n != 4) for n in range(26)]
    judged = judge(asked, answers, METRICS["exact"], controls=True)
    assert judged.scores["seen"] == [float(n != 4) for n in range(26)]
    assert judged.scores["majority"] == [1.0] + [float(n == 1) for n in range(1, 26)]


def test_too_many_questions_that_cannot_be_asked_end_the_evaluation(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"^2 of 26 questions cannot be asked, .*: question 3: q3 is too long$"
    ):
        ask(tmp_path, asked_about([*"abcdefghijklmnopqrstuvwxyz"]), Choosy("q3", "q20"))


def test_a_folder_keeps_to_one_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "er"
    demand_same(folder, {"model": "a", "questions": 3})
    demand_same(folder, {"model": "a", "questions": 3})
    with pytest.raises(UsageError, match="another evaluation, which differs in model; give anoth"):
        demand_same(folder, {"model": "b", "questions": 3})
    (folder / "asked.json").write_text("{")
    with pytest.raises(UsageError, match="cannot be used"):
        demand_same(folder, {"model": "a"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("")
    with pytest.raises(UsageError, match="is not empty, and holds no evaluation"):
        demand_same(tmp_path / "other", {"model": "a"})
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be used"):
        demand_same(tmp_path / "file", {"model": "a"})


def test_a_folder_whose_evaluation_was_killed_as_it_began_is_taken_up(tmp_path: Path) -> None:
    def killed(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # nothing of ours runs after a kill
        with pytest.raises(KeyboardInterrupt):
            demand_same(tmp_path, {"model": "a"})
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    demand_same(tmp_path, {"model": "a"})
    assert [path.name for path in tmp_path.iterdir()] == ["asked.json"]


def test_the_numbers_of_a_hand_made_case(tmp_path: Path) -> None:
    asked = asked_about(PICTURES)
    ask(tmp_path, asked, Model())
    judged = judge(asked, Answers(tmp_path), METRICS["exact"], controls=True)
    numbers = summary(judged, METRICS["exact"])
    assert numbers["num_questions"] == numbers["count"] == 7
    assert numbers["score"] == 1
    assert {kind: told["count"] for kind, told in numbers["by_type"].items()} == {
        "even": 4,
        "odd": 3,
    }
    assert {name: told["score"] for name, told in numbers["controls"].items()} == {
        "text_only": 1 / 7,  # the question without a picture
        "blind": 1 / 7,
        "majority": 3 / 7,  # c for even ones, two of four; for odd ones each is right once
    }
    assert numbers["seeing_adds"]["score"] == pytest.approx(6 / 7)
    low, high = numbers["seeing_adds"]["interval"]
    assert 0.3 < low < 6 / 7 < high <= 1


def test_every_type_has_all_numbers_and_pictures_stay_together(tmp_path: Path) -> None:
    asked = asked_about(["a", "a", "b", "b", "c", "c", "d", "d"])
    agreed = asked._replace(
        questions=[
            replace(one, answers=("yes" if n % 4 else "no",))
            for n, one in enumerate(asked.questions)
        ]
    )
    ask(tmp_path, agreed, Model(), controls=False)
    metric = METRICS["yesno"]
    numbers = summary(judge(agreed, Answers(tmp_path), metric, controls=False), metric)
    even, odd = numbers["by_type"]["even"], numbers["by_type"]["odd"]
    assert (even["precision"], even["recall"], even["yes_share"]) == (0.5, 1, 1)
    assert odd["f1"] == 1
    scores, groups = [0.0, 1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3]
    assert numbers["interval"] == list(interval(scores, groups=groups))
    assert even["interval"] == list(interval([0, 1, 0, 1]))


def test_captions_that_are_worth_nothing_are_no_share(tmp_path: Path) -> None:
    asked = asked_about([*"abcdefghij"])
    judged = Judged(asked.questions, list(range(10)), {"seen": ["x"] * 10}, {"seen": [0.0] * 10})
    numbers = summary(judged, replace(METRICS["caption"], more=lambda q, a: {}))
    assert numbers["interval"] == [0.0, pytest.approx(0.3)]


@pytest.mark.parametrize(
    ("metric", "given", "is_told"),
    [
        ("exact", "It is a red cat on a mat", True),
        ("exact", "red", False),
        ("exact", "a red cat", False),
        ("yesno", "It is a red cat on a mat", False),
    ],
)
def test_sentences_for_words_are_told(metric: str, given: str, is_told: bool) -> None:
    questions = asked_about(["a", "b", "c"]).questions
    judged = Judged(questions, [0, 1, 2], {"seen": [given, given, ""]}, {"seen": [0.0] * 3})
    found = notes(judged, METRICS[metric])
    assert bool(found) == is_told
    if is_told:
        assert found[0].startswith("Answers have 8 words in the median, the right ones 1, and for")
        assert "--prompt '{question} Answer with a single word or phrase.'" in found[0]
