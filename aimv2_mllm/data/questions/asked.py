"""Questions that a model is to be asked, with the right answers: JSON lines, a table, `datasets`.

Owns what the fields of a row are called and may hold. Rows that cannot be asked are left out and
counted; refused is data of which more than `MOST_LEFT_OUT` cannot, or that has no picture at all.
"""

import ast
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.pictures.images import decoded
from aimv2_mllm.data.questions.sources import GIVE, AskedSource, open_asked
from aimv2_mllm.errors import UsageError, nearest, show
from aimv2_mllm.marks import IMAGE_TOKEN

MOST_LEFT_OUT = 0.05  # of the rows
INDEX = "answer_index"  # the number, from 0, of the choice that is right, where the user says so
FIELDS = ("image", "question", "answers", INDEX, "type", "id", "choices")
OTHERS = {"answers": "answer"}  # a field -> what it may be called too


@dataclass(frozen=True)
class Question:
    """What is asked, the answers that are right, and by what its picture is known ("": none).

    `picture` is equal for questions about the same picture and changes with what the picture shows;
    `kind` is "" where the data has none.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    kind: str = ""
    choices: tuple[str, ...] = ()
    picture: str = ""

    @property
    def about(self) -> tuple[str, str]:
        """What it shares with other questions about its picture, and with no more."""
        return (self.picture, "" if self.picture else self.id)


class Asked(NamedTuple):
    """The questions of a source, how to get the picture of number i, and what was left out.

    `open` raises `Unusable` for what is no whole picture; `left_out` has the reason of each row.
    """

    questions: list[Question]
    open: Callable[[int], Image.Image]
    left_out: list[str]
    digest: str


def load_asked(
    data: str,
    *,
    root: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "test",
    limit: int | None = None,
) -> Asked:
    """The questions of `data`, a file, a folder or a hub id, in its order, `limit` at most.

    `columns` renames: a key of `FIELDS` -> the data's name for it. UsageError for data that is not
    there, has no such fields, no pictures or no answers.
    """
    columns = dict(columns or {})
    source = open_asked(data, root, split, columns.get("image", "image"))
    count = len(source) if limit is None else min(limit, len(source))
    names = _names(data, _first(source, count), columns) if count else {}
    questions, rows, left_out = list[Question](), list[int](), list[str]()
    for row in range(count):
        try:
            questions.append(_question(source, row, names))
            rows.append(row)
        except Unusable as error:
            left_out.append(f"{source.name(row)}: {error}")
    _demand(data, count, questions, left_out)

    def open_picture(number: int) -> Image.Image:
        content = source.picture(source.fields(rows[number])[names["image"]])
        return decoded(io.BytesIO(content))

    return Asked(questions, open_picture, left_out, source.digest)


def question_identity(questions: Sequence[Question], prompts: Sequence[str]) -> str:
    """What tells these questions, their pictures and the prompts that put them from others,
    whatever answers are right."""
    pairs = zip(questions, prompts, strict=True)
    said = [[question.id, prompt, question.picture] for question, prompt in pairs]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _first(source: AskedSource, count: int) -> Mapping[str, Any]:
    """The fields of the first row that can be read."""
    for row in range(count):
        with suppress(Unusable):
            return source.fields(row)
    return {}


def _demand(data: str, count: int, questions: Sequence[Question], left_out: Sequence[str]) -> None:
    if not count:
        raise UsageError(f"{data}: has no rows; {GIVE}")
    if len(left_out) > MOST_LEFT_OUT * count:
        raise UsageError(
            f"{data}: {len(left_out):,} of {count:,} rows cannot be asked, and {MOST_LEFT_OUT:.0%} "
            f"are the most; the first: {left_out[0]}"
        )
    if not any(question.picture for question in questions):
        raise UsageError(f"{data}: none of its {count:,} questions has a picture")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise UsageError(f"{data}: two questions have the id {question.id}; number them anew")
        seen.add(question.id)


def _names(data: str, first: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """The data's own name of each field that it has."""
    for field, column in columns.items():
        if column not in first:
            known = f"{', '.join(first)}{nearest(column, first)}"
            raise UsageError(f"{data}: has no field {column} ({field}); its first row has {known}")
    names = {}
    for field in FIELDS:
        others = (columns.get(field, field), OTHERS.get(field, field))
        if (field != INDEX or INDEX in columns) and (found := [n for n in others if n in first]):
            names[field] = found[0]
    if INDEX in names:
        names["answers"] = names[INDEX]
    missing = [field for field in ("image", "question", "answers") if field not in names]
    if missing:
        raise UsageError(
            f"{data}: its first row has no field {missing[0]}, only {', '.join(first)}; "
            f"--column {missing[0]}=NAME says what it is called there"
        )
    return names


def _question(source: AskedSource, row: int, names: Mapping[str, str]) -> Question:
    fields = source.fields(row)
    said = {field: fields.get(name) for field, name in names.items()}
    choices = tuple(_texts(said.get("choices"), "choices"))
    answers: tuple[str, ...]
    if INDEX in names:
        answers = (_choice_at(said[INDEX], choices),)
    else:
        answers = tuple(_texts(said["answers"], "answers"))
        _demand_clear(said["answers"], said.get("choices"), choices)
    text = said["question"]
    # Conversations for training mark the place of the picture in the question.
    text = text.replace(IMAGE_TOKEN, "").strip() if isinstance(text, str) else ""
    if not text:
        raise Unusable("no_question", f"its question is {show(said['question'])}")
    if not answers:
        raise Unusable("no_answer", "has no answer")
    kind, name = said.get("type"), said.get("id")
    image = said["image"]
    return Question(
        id=str(row) if name is None else str(name),
        text=text,
        answers=answers,
        kind="" if kind is None else str(kind),
        choices=choices,
        picture="" if image in (None, "") else source.identity(image),
    )


def _choice_at(index: Any, choices: Sequence[str]) -> str:
    number = int(index) if isinstance(index, str) and index.strip().isdecimal() else index
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(choices):
        raise Unusable(
            "odd_row",
            f"its {INDEX} is {show(index)}, must be the number, from 0, of one of its "
            f"{len(choices)} choices",
        )
    return choices[number]


def _demand_clear(answer: Any, listed: Any, choices: Sequence[str]) -> None:
    """`Unusable` for a number as the answer that is one choice's words and another's place."""
    is_number = isinstance(answer, int) and not isinstance(answer, bool)
    if not is_number or str(answer) not in choices or not 0 <= answer < len(choices):
        return
    are_numbers = isinstance(listed, list) and all(isinstance(one, int | float) for one in listed)
    if not are_numbers and choices[answer] != str(answer):
        raise Unusable(
            "odd_row",
            f"its answer {answer} is one of its choices, and the number of another: write it as "
            f"text, or say --column {INDEX}=NAME",
        )


def _listed(text: str) -> list[Any]:
    """The choices that a text lists: as JSON or Python write a list, or with | between them."""
    for read in (json.loads, ast.literal_eval) if text.startswith("[") else ():
        with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            if isinstance(found := read(text), list):
                return found
    if text.startswith("[") and "|" not in text:
        raise Unusable("odd_row", f"{show(text)} in its choices is no list")
    return text.split("|")


def _texts(value: Any, field: str) -> list[str]:
    """The texts of a field: one, or a list of them, or of mappings with an `answer` each."""
    if isinstance(value, str) and field == "choices":
        value = _listed(value)
    listed = [] if value is None else value if isinstance(value, list) else [value]
    texts = []
    for one in listed:
        one = one.get("answer") if isinstance(one, dict) else one
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise Unusable("odd_row", f"{show(one)} in its {field} is no text")
        texts.append(str(one).strip())
    return texts if any(texts) else []
