"""Questions about held-out sheets: what is asked, and what is right."""

from collections import Counter
from types import SimpleNamespace

import pytest

from aimv2_mllm.data.handwriting import held_out, scenes
from aimv2_mllm.data.handwriting.held_out import HeldOut
from aimv2_mllm.evaluation import answers

SEED = 3


def sheets(count: int) -> list[scenes.Scene]:
    return [held_out.held_out_sheet(SEED, index) for index in range(count)]


def test_every_kind_is_asked_equally_often() -> None:
    asked = held_out.held_out_questions(SEED, 3 * len(scenes.QUESTIONS) + 2)
    counts = Counter(question.kind for question in asked)
    assert set(counts) == set(scenes.QUESTIONS)
    assert sorted(counts.values()) == [3, 3, 3, 3, 3, 4, 4]
    assert Counter(question.sheet for question in asked) == {0: 7, 1: 7, 2: 7, 3: 2}


def test_questions_are_the_seeds_and_about_held_out_ink() -> None:
    asked = held_out.held_out_questions(SEED, 70)
    assert asked == held_out.held_out_questions(SEED, 70)
    assert asked != held_out.held_out_questions(SEED + 1, 70)
    heldout = set(scenes.split_scans("heldout").tolist())
    assert all(digit.scan in heldout for sheet in sheets(10) for digit in sheet.digits)


def test_a_sheet_in_words_names_each_digit_before_the_question() -> None:
    for asked in held_out.held_out_questions(SEED, 21):
        text = held_out.in_words(SEED, asked)
        sheet = held_out.held_out_sheet(SEED, asked.sheet)
        told = text.removeprefix("On the sheet: ").removesuffix(f". {asked.text}")
        assert text == f"On the sheet: {told}. {asked.text}"
        assert answers.is_exact_caption(told, sheet)


def test_an_answer_is_right_but_for_space_and_case() -> None:
    assert answers.is_right(" Bottom Left\n", "bottom left")
    assert not answers.is_right("bottom left.", "bottom left")
    assert not answers.is_right("17", "7")


def test_scores_of_a_hand_made_case() -> None:
    asked = [
        HeldOut(0, "count", "?", "2"),
        HeldOut(1, "count", "?", "2"),
        HeldOut(2, "count", "?", "3"),
        HeldOut(0, "exists", "?", "no"),
    ]
    given = ["2", "3", "3", "yes"]
    assert answers.accuracy(asked, given) == 0.5
    assert answers.by_kind(asked, given) == {"count": 2 / 3, "exists": 0.0}


SHEET = SimpleNamespace(
    digits=(
        scenes.Digit(7, "red", "top left", 0, 0, 0, 0.3),
        scenes.Digit(3, "orange", "bottom right", 0, 0.6, 0.6, 0.3),
    )
)


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("a red 7 at the top left and an orange 3 at the bottom right", True),
        ("an orange 3 at the bottom right and a red 7 at the top left", True),
        ("a red 7 at the top left", False),
        ("a red 7 at the top left and an orange 8 at the bottom right", False),
        ("a red 7 at the bottom right and an orange 3 at the top left", False),
        ("a red 7 at the top left, a red 7 at the top left and an orange 3 at the bottom right", 0),
        ("a red 7 at the top left and an orange 3 at the bottom right and so on", False),
        ("", False),
    ],
)
def test_a_caption_is_exact_when_it_names_all_and_no_other(text: str, exact: bool) -> None:
    assert answers.is_exact_caption(text, SHEET) == exact


def test_wrong_words_of_a_caption_are_marked() -> None:
    text = "a red 7 at the top right, and a blue 3 at the bottom right <b>"
    wrong = [word for word, right in answers.marked_caption(text, SHEET) if not right]
    assert wrong == ["right,", "a", "blue", "<b>"]
    assert [word for word, _ in answers.marked_caption(text, SHEET)] == text.split()
    assert answers.missing_phrases(text, SHEET) == [
        "a red 7 at the top left",
        "an orange 3 at the bottom right",
    ]
    assert answers.marked_caption("", SHEET) == []
