"""Questions that a model is to be asked, with the right answers: JSON lines, a table, `datasets`.

Owns what the fields of a row are called and may hold. Rows that cannot be asked are left out and
counted; refused is data of which more than `MOST_LEFT_OUT` cannot, or that has no picture at all.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from aimv2_mllm.data.asked_sources import GIVE, Source, open_asked
from aimv2_mllm.data.conversations import IMAGE_TOKEN
from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.images import as_rgb, opened, upright
from aimv2_mllm.errors import UsageError, nearest, show

MOST_LEFT_OUT = 0.05  # of the rows
FIELDS = ("image", "question", "answers", "type", "id", "choices")
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
        with opened(io.BytesIO(content)) as picture:
            picture.load()
            return as_rgb(upright(picture))

    return Asked(questions, open_picture, left_out, source.digest)


def question_identity(questions: Sequence[Question], prompts: Sequence[str]) -> str:
    """What tells these questions, their pictures and the prompts that put them from others,
    whatever answers are right."""
    pairs = zip(questions, prompts, strict=True)
    said = [[question.id, prompt, question.picture] for question, prompt in pairs]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _first(source: Source, count: int) -> Mapping[str, Any]:
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
        if found := [name for name in others if name in first]:
            names[field] = found[0]
    missing = [field for field in ("image", "question", "answers") if field not in names]
    if missing:
        raise UsageError(
            f"{data}: its first row has no field {missing[0]}, only {', '.join(first)}; "
            f"--column {missing[0]}=NAME says what it is called there"
        )
    return names


def _question(source: Source, row: int, names: Mapping[str, str]) -> Question:
    fields = source.fields(row)
    said = {field: fields.get(name) for field, name in names.items()}
    answers = tuple(_texts(said["answers"], "answers"))
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
        choices=tuple(_texts(said.get("choices"), "choices")),
        picture="" if image in (None, "") else source.identity(image),
    )


def _texts(value: Any, field: str) -> list[str]:
    """The texts of a field: one, or a list of them, or of mappings with an `answer` each."""
    if isinstance(value, str) and field == "choices":
        value = json.loads(value) if value.startswith("[") else value.split("|")
    listed = [] if value is None else value if isinstance(value, list) else [value]
    texts = []
    for one in listed:
        one = one.get("answer") if isinstance(one, dict) else one
        if isinstance(one, bool) or not isinstance(one, str | int | float):
            raise Unusable("odd_row", f"{show(one)} in its {field} is no text")
        texts.append(str(one).strip())
    return texts if any(texts) else []
