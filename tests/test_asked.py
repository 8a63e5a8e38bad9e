"""Questions of data sets: what the fields are called, which rows are left out, what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.questions.asked import Asked, Question, load_asked, question_identity
from aimv2_mllm.errors import UsageError

ROW = {"image": "0.png", "question": "What is it?", "answers": ["red", "a red one"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three pictures, each of a width of its own."""
    for number in range(3):
        Image.new("RGB", (20 + number, 30), "red").save(tmp_path / f"{number}.png")
    return tmp_path


def lines(folder: Path, *rows: Any) -> str:
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "q.jsonl")


def one(folder: Path, row: Any, **words: Any) -> Question:
    [question] = load_asked(lines(folder, row), **words).questions
    return question


def content(folder: Path, name: str) -> str:
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_a_row_is_a_question_with_its_answers(folder: Path) -> None:
    assert one(folder, {**ROW, "id": 7, "type": "colour", "choices": ["red", "blue"]}) == Question(
        "7",
        "What is it?",
        ("red", "a red one"),
        "colour",
        ("red", "blue"),
        content(folder, "0.png"),
    )
    assert one(folder, ROW) == Question(
        "0", "What is it?", ("red", "a red one"), picture=content(folder, "0.png")
    )


@pytest.mark.parametrize(
    ("said", "answers"),
    [
        ({"answer": "red"}, ("red",)),
        ({"answers": "red"}, ("red",)),
        ({"answer": 3}, ("3",)),
        ({"answer": 2.5}, ("2.5",)),
        ({"answers": [{"answer": "red", "answer_id": 1}, {"answer": "blue"}]}, ("red", "blue")),
        ({"answers": [" é ", ""]}, ("é", "")),
    ],
)
def test_answers_are_texts_numbers_or_those_of_people(
    folder: Path, said: dict[str, Any], answers: tuple[str, ...]
) -> None:
    assert one(folder, {"image": "0.png", "question": "?", **said}).answers == answers


@pytest.mark.parametrize(
    ("said", "choices"),
    [
        (["red", 7], ("red", "7")),
        ("red|dark blue", ("red", "dark blue")),
        ('["red", "$7"]', ("red", "$7")),
        ("['$6', 'it\\'s \"7\"']", ("$6", 'it\'s "7"')),  # as MMMU has them
        ("[0, 1]|[1, 0]", ("[0, 1]", "[1, 0]")),
        (None, ()),
    ],
)
def test_choices_are_listed_in_any_of_these_ways(
    folder: Path, said: Any, choices: tuple[str, ...]
) -> None:
    assert one(folder, {**ROW, "choices": said}).choices == choices


@pytest.mark.parametrize("index", [1, "1"])
def test_an_answer_may_be_the_number_of_a_choice_where_that_is_said(
    folder: Path, index: Any
) -> None:
    row = {"image": "0.png", "question": "?", "answer": index, "choices": ["1", "2", "3"]}
    columns = {"answer_index": "answer"}
    assert one(folder, row, columns=columns).answers == ("2",)
    assert one(folder, {**row, "answer": "1"}).answers == ("1",)
    named = {**row, "answer": "2", "answer_index": 0}
    assert one(folder, named).answers == ("2",)  # nobody has said it
    assert one(folder, named, columns={"answer_index": "answer_index"}).answers == ("1",)


def test_fields_may_have_other_names(folder: Path) -> None:
    row = {"image": "1.png", "text": "Is it?", "label": "yes", "question_id": 5}
    columns = {"question": "text", "answers": "label", "id": "question_id"}
    assert one(folder, row, columns=columns) == Question(
        "5", "Is it?", ("yes",), picture=content(folder, "1.png")
    )


def test_the_mark_of_a_picture_is_no_part_of_the_question(folder: Path) -> None:
    assert one(folder, {**ROW, "question": "<image>\nWhat is it?"}).text == "What is it?"


def test_pictures_are_named_from_the_root_and_opened_upright(folder: Path) -> None:
    (folder / "text").mkdir()
    (folder / "text" / "q.json").write_text(json.dumps([ROW, {**ROW, "image": "2.png"}]))
    asked = load_asked(str(folder / "text" / "q.json"), root=str(folder))
    assert [asked.open(number).size for number in range(2)] == [(20, 30), (22, 30)]


def test_a_folder_with_a_table(folder: Path) -> None:
    (folder / "questions.csv").write_text(
        "image,question,answer,type\n0.png,What is it?,red,colour\n,How many?,2,count\n"
    )
    asked = load_asked(str(folder))
    assert asked.questions == [
        Question("0", "What is it?", ("red",), "colour", picture=content(folder, "0.png")),
        Question("1", "How many?", ("2",), "count"),
    ]
    assert asked.open(0).size == (20, 30)


def test_questions_are_known_by_what_their_pictures_show_and_not_by_their_names(
    folder: Path,
) -> None:
    data = lines(folder, ROW, {**ROW, "image": "1.png"})
    prompts = ["What is it?"] * 2

    def identity(**words: Any) -> str:
        return question_identity(load_asked(data, **words).questions, prompts)

    before = identity()
    for name in ("copied", "blurred"):
        (folder / name).mkdir()
        for picture in ("0.png", "1.png"):
            (folder / name / picture).write_bytes((folder / picture).read_bytes())
    assert identity(root=str(folder / "copied")) == before
    Image.new("RGB", (20, 30), "blue").save(folder / "blurred" / "0.png")
    assert identity(root=str(folder / "blurred")) != before
    (folder / "1.png").write_bytes((folder / "2.png").read_bytes())
    assert identity() != before
    assert question_identity(load_asked(data).questions, ["?", "What is it?"]) != identity()


def dataset(folder: Path) -> str:
    from datasets import Dataset, DatasetDict, Features, Image, List, Value

    paths = [str(folder / name) for name in ("0.png", "1.png", "0.png")]
    texts = {"picture": paths, "question": ["a", "b", "c"], "answers": [["x"], ["y", "z"], ["x"]]}
    kinds = {"picture": Image(), "question": Value("string"), "answers": List(Value("string"))}
    rows = Dataset.from_dict(texts, features=Features(kinds))
    DatasetDict({"val": rows}).save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def test_a_dataset_knows_equal_pictures_by_their_bytes(folder: Path) -> None:
    asked = load_asked(dataset(folder), columns={"image": "picture"}, split="val")
    assert [question.answers for question in asked.questions] == [("x",), ("y", "z"), ("x",)]
    first, second, third = (question.picture for question in asked.questions)
    assert first == third != second
    assert asked.open(1).size == (21, 30)


def many(folder: Path, *odd: Any) -> Asked:
    """Twenty times as many sound rows as odd ones."""
    return load_asked(lines(folder, *odd, *[ROW] * (20 * len(odd))))


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({**ROW, "answers": []}, "has no answer"),
        ({**ROW, "answers": None}, "has no answer"),
        ({**ROW, "answers": [""]}, "has no answer"),
        ({**ROW, "answers": [True]}, "true in its answers is no text"),
        ({**ROW, "choices": "['a', b]"}, "\"['a', b]\" in its choices is no list"),
        ({**ROW, "choices": "[" * 10_000}, "in its choices is no list"),
        (
            {"image": "0.png", "question": "?", "answers": 1, "choices": ["1", "2"]},
            "its answer 1 is one of its choices, and the number of another: write it as text, or",
        ),
        ({**ROW, "question": " "}, 'its question is " "'),
        ({**ROW, "question": None}, "its question is null"),
        ({**ROW, "image": "9.png"}, "there is no picture 9.png"),
        ({**ROW, "image": "../x.png"}, "leads out of"),
        ({**ROW, "image": 3}, "image is 3, and not a picture's path"),
        (3, "is no mapping but 3"),
    ],
)
def test_odd_rows_are_left_out_and_counted(folder: Path, odd: Any, why: str) -> None:
    asked = many(folder, odd)
    assert len(asked.questions) == 20
    [said] = asked.left_out
    assert why in said
    assert said.startswith(f"{folder / 'q.jsonl'}, row 0: ")
    assert asked.questions[0].id == "1"  # the row's number


@pytest.mark.parametrize("index", [2, -1, "x", 0.5, True, None])
def test_a_number_of_no_choice_is_odd(folder: Path, index: Any) -> None:
    sound = {**ROW, "n": 1, "choices": ["a", "b"]}
    data = lines(folder, *[sound] * 20, {**sound, "n": index})
    [said] = load_asked(data, columns={"answer_index": "n"}).left_out
    assert "must be the number, from 0, of one of its 2 choices" in said


def test_numbers_among_numbers_are_their_own_words(folder: Path) -> None:
    row = {"image": "0.png", "question": "?", "answer": 1, "choices": [1, 2]}
    assert one(folder, row).answers == ("1",)


def test_too_many_odd_rows_are_refused_with_the_first(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"2 of 3 rows cannot be asked, .*the first: .*row 1: has"):
        load_asked(lines(folder, ROW, {**ROW, "answers": []}, {**ROW, "question": 3}))


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "has no rows"),
        ([{"question": "?", "answer": "x"}], "has no field image, only question, answer; --column"),
        ([{"image": "0.png", "answer": "x"}], "has no field question"),
        ([{"image": "0.png", "question": "x"}], "has no field answers"),
        ([{**ROW, "image": None}, {**ROW, "image": ""}], "none of its 2 questions has a picture"),
        ([{**ROW, "id": 1}, {**ROW, "id": "1"}], "two questions have the id 1"),
    ],
)
def test_data_that_cannot_be_asked_is_refused(folder: Path, rows: list[Any], why: str) -> None:
    with pytest.raises(UsageError, match=why) as error:
        load_asked(lines(folder, *rows))
    assert "\n" not in str(error.value)


def test_what_is_no_data_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file or folder; give a file of JSON"):
        load_asked(str(folder / "absent"))
    with pytest.raises(
        UsageError, match=r"has no field colour \(answers\); its first row has image"
    ):
        load_asked(lines(folder, ROW), columns={"answers": "colour"})
    with pytest.raises(UsageError, match=r"there is no such folder \(--root\)"):
        load_asked(lines(folder, ROW), root=str(folder / "absent"))
    with pytest.raises(UsageError, match="--root is for a file of JSON lines"):
        load_asked(str(folder), root=str(folder))
    with pytest.raises(UsageError, match="has no split test; it has val"):
        load_asked(dataset(folder), columns={"image": "picture"})
    with pytest.raises(UsageError, match=r'has no column "image" \(image\); it has picture'):
        load_asked(str(folder / "saved"), split="val")


def test_a_damaged_picture_is_unusable_when_it_is_opened(folder: Path) -> None:
    (folder / "0.png").write_bytes(b"no picture")
    asked = load_asked(lines(folder, ROW))
    with pytest.raises(Unusable, match="is not a picture"):
        asked.open(0)


def test_the_world_of_handwriting_is_asked_of_each_kind_alike() -> None:
    asked = load_asked("handwriting", limit=21)
    kinds = [question.kind for question in asked.questions]
    assert {kinds.count(kind) for kind in kinds} == {3}
    assert [question.picture for question in asked.questions] == [str(n // 7) for n in range(21)]
    assert asked.open(0).size == (336, 336)
    assert asked.open(6).tobytes() == asked.open(0).tobytes() != asked.open(7).tobytes()
    assert len(load_asked("handwriting").questions) == 1400
