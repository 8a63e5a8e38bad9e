"""Where conversations come from: one class a kind of source, named in `TALK_SOURCES`.

As with `pairs.sources`: what is wrong with the whole source is a UsageError when it is opened,
what is wrong with a row is an `Unusable` when that row is read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from aimv2_mllm.data.files import (
    MAX_PICTURE_BYTES,
    Later,
    Unusable,
    below,
    read_later,
)
from aimv2_mllm.data.order import mixed
from aimv2_mllm.data.pairs.sources import open_source
from aimv2_mllm.data.rows.json_index import open_rows
from aimv2_mllm.data.rows.question_tables import COLUMNS, QuestionTable
from aimv2_mllm.data.rows.tables import Pictures, load_table, picture_later
from aimv2_mllm.data.talks.conversations import Message, messages_of
from aimv2_mllm.errors import UsageError, show
from aimv2_mllm.marks import IMAGE_TOKEN
from aimv2_mllm.recipe.data import (
    CaptionTalks,
    ConversationData,
    HandwritingTalks,
    LlavaTalks,
    MessagesTalks,
    QuestionTalks,
    TextsTalks,
)

SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # LLaVA's words for them


class Talk(NamedTuple):
    """A conversation and what reads its pictures, in the order of the messages."""

    messages: list[Message]
    pictures: list[Later]


class TalkSource(Protocol):
    """Conversations by number."""

    groups: list[int]  # how many rows lie together, in order; their sum is the number of rows
    notes: list[str]  # what a user should know of it
    digest: str  # changes when other rows would be read

    def read(self, row: int) -> Talk:
        """The conversation of a row; `Unusable` where it cannot be had, as far as that shows before
        its pictures are read."""

    def name(self, row: int) -> str:
        """Where the row is, in words."""


class LlavaJson:
    """LLaVA's JSON list, or JSON lines, with pictures below a folder."""

    def __init__(self, config: LlavaTalks) -> None:
        file = Path(config.file).expanduser()
        self._rows, self._root = open_rows(file), Path(config.root or file.parent).expanduser()
        if not self._root.is_dir():
            raise UsageError(f"{self._root}: there is no such folder (root)")
        self.groups, self.notes, self.digest = [len(self._rows)], list[str](), self._rows.digest()

    def name(self, row: int) -> str:
        """Where the row is, in words."""
        return f"{self._rows.file}, row {row}"

    def read(self, row: int) -> Talk:
        """The row's conversation and pictures."""
        fields = self._rows.read(row)
        if not isinstance(fields, dict):
            raise Unusable("odd_row", f"is no mapping but {show(fields)}")
        said = []
        for one in _listed(fields.get("conversations"), "conversations"):
            speaker, text = (one.get("from"), one.get("value")) if isinstance(one, dict) else (0, 0)
            if not isinstance(speaker, str) or not isinstance(text, str):
                raise Unusable("odd_row", f"{show(one)} is not a text that somebody says")
            if speaker not in SPEAKERS:
                raise Unusable("roles", f"{show(speaker)} speaks; {', '.join(SPEAKERS)} may")
            said.append((SPEAKERS[speaker], text))
        image = fields.get("image")
        paths = image if isinstance(image, list) else [image] if image else []
        if not all(isinstance(path, str) and path for path in paths):
            raise Unusable("odd_row", f"image is {show(image)}, not a path or a list of paths")
        messages = messages_of(said, len(paths))
        pictures = [read_later(below(self._root, path), MAX_PICTURE_BYTES) for path in paths]
        return Talk(messages, pictures)


class TableOfTalks:
    """The rows of a data set of the library `datasets`."""

    def __init__(self, config: MessagesTalks | TextsTalks) -> None:
        self._config = config
        self._column = config.messages if isinstance(config, MessagesTalks) else config.texts
        columns: dict[str, str] = {config.kind: self._column}
        if config.images is not None:
            columns["images"] = config.images
        rows, self.digest = load_table(config, columns)
        self._turns = rows.select_columns([self._column])
        self._pictures = None if config.images is None else Pictures(rows, config.images)
        self.groups, self.notes = [len(rows)], list[str]()

    def name(self, row: int) -> str:
        """Where the row is, in words."""
        return f"{self._config.dataset}, row {row}"

    def read(self, row: int) -> Talk:
        """The row's conversation and pictures."""
        turns = self._turns[row][self._column]
        if isinstance(turns, str):
            try:
                turns = json.loads(turns)
            except (ValueError, RecursionError) as error:
                raise Unusable("not_json", f"{self._column} is not JSON ({error})") from None
        said = []
        for one in _listed(turns, self._column):
            if not isinstance(one, dict):
                raise Unusable("odd_row", f"{show(one)} is not a text that somebody says")
            if isinstance(self._config, MessagesTalks):
                said.append((str(one.get("role")), _content(one.get("content"))))
            else:
                said += [(role, _content(one.get(role))) for role in ("user", "assistant")]
        pictures = self._pictures.of(row) if self._pictures is not None else []
        messages = messages_of(said, len(pictures))
        return Talk(messages, [picture_later(picture) for picture in pictures])


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise Unusable("odd_row", f"its {name} are no list but {show(value)}")
    return value


def _content(value: Any) -> str:
    """A message's content, text or a list of parts, with `<image>` for each picture."""
    if isinstance(value, str):
        return value
    texts = []
    for part in value if isinstance(value, list) else [value]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "image_url"):
            texts.append(IMAGE_TOKEN)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise Unusable("odd_row", f"{show(part)} is neither text nor a picture")
    return "".join(texts)


class Captions:
    """The rows of a source of captions, each the answer to one of some prompts."""

    def __init__(self, config: CaptionTalks) -> None:
        self._pairs, self._prompts = open_source(config.pairs), config.prompts
        self.groups, self.notes = self._pairs.groups, self._pairs.notes
        self.digest = self._pairs.digest

    def name(self, row: int) -> str:
        """Where the row is, in words."""
        return self._pairs.name(row)

    def read(self, row: int) -> Talk:
        """The row's picture, one of the prompts, always the same, and the caption."""
        caption, picture = self._pairs.caption(row)
        prompt = self._prompts[mixed(row) % len(self._prompts)]
        return Talk(messages_of([("user", prompt), ("assistant", caption)], 1), [picture])


class Questions:
    """A folder of pictures with a table of questions: a question a row, with or without picture."""

    def __init__(self, config: QuestionTalks) -> None:
        self._folder = Path(config.folder).expanduser()
        self._table = QuestionTable(self._folder / config.file)
        self.groups, self.notes = [len(self._table)], list[str]()
        self.digest = self._table.digest

    def name(self, row: int) -> str:
        """Where the row is, in words."""
        return self._table.name(row)

    def read(self, row: int) -> Talk:
        """The row's picture, where it names one, its question and its answer."""
        fields = self._table.fields(row)
        image, question, answer = (fields[name] for name in COLUMNS)
        messages = messages_of([("user", question), ("assistant", answer)], 1 if image else 0)
        path = below(self._folder, image)
        return Talk(messages, [read_later(path, MAX_PICTURE_BYTES)] if image else [])


TALK_SOURCES: dict[str, Callable[[Any], TalkSource]] = {
    "llava": LlavaJson,
    "messages": TableOfTalks,
    "texts": TableOfTalks,
    "captions": Captions,
    "questions": Questions,
}


def open_talk_sources(data: ConversationData) -> list[TalkSource | HandwritingTalks]:
    """The sources of `data` in its order; the embedded world, which needs no opening, as it is.

    UsageError where one is not there, is damaged as a whole, or has no rows.
    """
    found: list[TalkSource | HandwritingTalks] = []
    for number, config in enumerate(data.sources):
        if isinstance(config, HandwritingTalks):
            found.append(config)
            continue
        source = TALK_SOURCES[config.kind](config)
        if not sum(source.groups):
            notes = "".join(f"; {note}" for note in source.notes)
            raise UsageError(f"data.sources.{number}: has no rows{notes}")
        found.append(source)
    return found
