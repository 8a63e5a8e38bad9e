"""The embedded world: real scans, never in both splits, and questions with one right answer."""

from collections import Counter

import numpy as np
import pytest

from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.handwriting.scenes import INKS, PLACES, QUESTIONS, Scene


def many(split: scenes.Split = "train", count: int = 400) -> list[Scene]:
    return [scenes.scene(0, split, index) for index in range(count)]


def test_every_scan_belongs_to_one_split_and_a_fifth_of_each_value_is_held_out() -> None:
    train, heldout = scenes.split_scans("train"), scenes.split_scans("heldout")
    assert sorted([*train, *heldout]) == list(range(1797))
    values = scenes.scans()[1]
    for value in range(10):
        share = (values[heldout] == value).sum() / (values == value).sum()
        assert share == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_sheet_shows_scans_of_its_own_split_alone(split: scenes.Split) -> None:
    allowed = set(scenes.split_scans(split).tolist())
    assert {digit.scan for sheet in many(split) for digit in sheet.digits} <= allowed


def test_a_scene_is_a_pure_function_of_seed_split_and_index() -> None:
    assert scenes.scene(3, "train", 7) == scenes.scene(3, "train", 7)
    others = [(4, "train", 7), (3, "heldout", 7), (3, "train", 8), (3 + 2**64, "train", 7)]
    assert all(scenes.scene(3, "train", 7) != scenes.scene(*key) for key in others)


def test_sheets_have_one_to_four_digits_without_a_value_ink_or_place_twice() -> None:
    sheets = many()
    assert Counter(len(sheet.digits) for sheet in sheets).keys() == {1, 2, 3, 4}
    for sheet in sheets:
        for field in ("value", "ink", "place"):
            names = [getattr(digit, field) for digit in sheet.digits]
            assert len(set(names)) == len(names)
        assert [PLACES.index(d.place) for d in sheet.digits] == sorted(
            PLACES.index(d.place) for d in sheet.digits
        )


def test_all_inks_values_places_occur_and_sizes_differ() -> None:
    digits = [digit for sheet in many() for digit in sheet.digits]
    assert {d.ink for d in digits} == set(INKS)
    assert {d.value for d in digits} == set(range(10))
    assert {d.place for d in digits} == set(PLACES)
    assert np.ptp([d.side for d in digits]) > 0.8 * (scenes.LARGEST - scenes.SMALLEST)


@pytest.mark.parametrize("size", [56, 224])
def test_every_digit_is_drawn_in_its_ink_inside_its_quarter(size: int) -> None:
    for sheet in many(count=40):
        for digit in sheet.digits:
            alone = scenes.render(Scene(sheet.paper, (digit,)), size).astype(int)
            touched = np.argwhere((alone != sheet.paper).any(-1))
            row, column = divmod(PLACES.index(digit.place), 2)
            low, high = touched.min(0), touched.max(0)
            half = size / 2
            assert low[0] >= row * half - 1
            assert high[0] <= (row + 1) * half
            assert low[1] >= column * half - 1
            assert high[1] <= (column + 1) * half
            darkest = alone.reshape(-1, 3)[np.abs(alone - sheet.paper).sum(-1).argmax()]
            assert np.abs(darkest - INKS[digit.ink]).max() <= 40


def test_a_caption_names_every_digit_in_reading_order() -> None:
    sheet = Scene(
        (255, 255, 255),
        (
            scenes.Digit(7, "red", "top left", 0, 0, 0, 0.4),
            scenes.Digit(4, "orange", "top right", 1, 0.5, 0, 0.4),
            scenes.Digit(3, "blue", "bottom right", 2, 0.5, 0.5, 0.4),
        ),
    )
    assert scenes.caption(sheet) == (
        "a red 7 at the top left, an orange 4 at the top right and a blue 3 at the bottom right"
    )


def test_every_question_has_the_answer_that_the_sheet_gives() -> None:
    sheet = Scene(
        (255, 255, 255),
        (
            scenes.Digit(7, "red", "top left", 0, 0, 0, 0.4),
            scenes.Digit(3, "blue", "bottom right", 2, 0.5, 0.5, 0.4),
        ),
    )
    right = {
        "Which digit is red?": "7",
        "What is the blue digit?": "3",
        "What colour is the 7?": "red",
        "In which colour is the 3 written?": "blue",
        "Where is the 7?": "top left",
        "In which corner is the 3?": "bottom right",
        "Which digit is at the top left?": "7",
        "What is written at the bottom right?": "3",
        "How many digits are there?": "2",
        "How many digits do you see?": "2",
        "Is there a red 7?": "yes",
        "Do you see a blue 7?": "no",
        "Is there an orange 3?": "no",
        "What is the largest digit?": "7",
        "Which digit has the highest value?": "7",
    }
    seen = {}
    for index in range(3000):
        question = scenes.question(sheet, scenes.generator(index))
        seen[question.text] = question.answer
    assert seen.items() >= right.items()


def test_questions_of_all_kinds_come_and_half_of_the_existence_questions_are_false() -> None:
    kinds: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    for index, sheet in enumerate(many(count=2800)):
        question = scenes.question(sheet, scenes.generator(1, index))
        kinds[question.kind] += 1
        if question.kind == "exists":
            answers[question.answer] += 1
    assert kinds.keys() == QUESTIONS.keys()
    assert min(kinds.values()) > 300
    assert answers["no"] / answers.total() == pytest.approx(0.5, abs=0.1)


SHEET = Scene(
    (255, 255, 255),
    (
        scenes.Digit(7, "red", "top left", 0, 0, 0, 0.4),
        scenes.Digit(3, "blue", "bottom right", 2, 0.5, 0.5, 0.4),
    ),
)


def test_a_table_answers_for_every_key_there_could_be() -> None:
    tables = dict(scenes.table(SHEET, scenes.generator(index)) for index in range(60))
    digits = {"0 none", "1 none", "2 none", "4 none", "5 none", "6 none", "8 none", "9 none"}
    inks = {"black none", "green none", "orange none", "purple none"}
    places = {"top right none", "bottom left none"}
    assert {asked: set(answer.split(", ")) for asked, answer in tables.items()} == {
        "Which colour for each digit?": digits | {"7 red", "3 blue"},
        "Which place for each digit?": digits | {"7 top left", "3 bottom right"},
        "Which digit for each place?": places | {"top left 7", "bottom right 3"},
        "Which digit for each colour?": inks | {"red 7", "blue 3"},
        "Which place for each colour?": inks | {"red top left", "blue bottom right"},
        "Which colour for each place?": places | {"top left red", "bottom right blue"},
    }


def test_several_look_ups_are_answered_in_the_order_of_asking() -> None:
    asked = {scenes.several(SHEET, scenes.generator(index)) for index in range(120)}
    assert len(asked) == 12
    assert ("Which colour: the 7 and the 3?", "7 is red, 3 is blue") in asked
    assert ("Which colour: the 3 and the 7?", "3 is blue, 7 is red") in asked
    assert ("Which digit: top left and bottom right?", "top left is 7, bottom right is 3") in asked
    assert (
        "Which place: the blue digit and the red digit?",
        "blue is bottom right, red is top left",
    ) in asked
