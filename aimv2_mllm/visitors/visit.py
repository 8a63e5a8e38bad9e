"""A conversation as a page shows it, and the same as a model is asked it.

Owns what retry, undo and edit make of it, and the limits of a visitor's pictures. Refuses a picture
above them before it is decoded, by the name that the visitor knows and never by its place here.
"""

import tempfile
from collections.abc import Sequence
from itertools import groupby
from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimv2_mllm.chat.transcript import as_json, from_json
from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.pictures.images import decoded
from aimv2_mllm.data.talks.conversations import Message, said
from aimv2_mllm.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 16_000_000  # of a visitor's picture: 48 MB as RGB
MOST_PICTURES = 16  # in a conversation
MOST_LETTERS = 20_000  # of a question

# role: "user" | "assistant"
# content: list of {"type": "text", "text": …} | {"type": "file", "file": {"path": …}}
Shown = dict[str, Any]


def picture_of(path: str | Path | None) -> "Image.Image":
    """The picture that a visitor gave, as RGB and upright.

    UsageError where there is none, where it is none, and for more than `MOST_PIXELS` pixels.
    """
    if path is None:
        raise UsageError("there is no picture yet: give one first")
    try:
        with Path(path).open("rb") as stream:
            return decoded(stream, MOST_PIXELS)
    except Unusable as error:
        raise UsageError(f"{Path(path).name}: {error}") from None
    except OSError as error:
        raise UsageError(f"{Path(path).name}: cannot be read ({error.strerror})") from None


def with_question(shown: Sequence[Shown], text: str, files: Sequence[str]) -> list[Shown]:
    """The conversation with a question behind it; UsageError for one that cannot be asked."""
    if not text.strip():
        raise UsageError("the question is empty: write one, then send it")
    if len(text) > MOST_LETTERS:
        raise UsageError(f"the question has {len(text):,} letters, and {MOST_LETTERS:,} are most")
    count = len(files) + len(pictures(shown))
    if count > MOST_PICTURES:
        raise UsageError(f"that would be {count} pictures, and {MOST_PICTURES} are the most")
    for file in files:
        picture_of(file)
    return [*shown, *question(text, files)]


def question(text: str, files: Sequence[str]) -> list[Shown]:
    """A question as a page shows it: each picture, then the text, a message each, for what is
    edited on the page is a whole message."""
    parts = [{"type": "file", "file": {"path": f, "mime_type": guess_type(f)[0]}} for f in files]
    return [
        {"role": "user", "content": [part]} for part in (*parts, {"type": "text", "text": text})
    ]


def answer(text: str) -> Shown:
    """An answer as a page shows it."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def without_answer(shown: Sequence[Shown]) -> list[Shown]:
    """The conversation up to its last question, to be answered again."""
    _, end = _last_question(shown)
    if not end:
        raise UsageError("nothing was asked yet")
    return list(shown[:end])


def without_question(shown: Sequence[Shown]) -> tuple[list[Shown], str, list[str]]:
    """The conversation before its last question, and of this the text and the pictures."""
    start, end = _last_question(shown)
    return list(shown[:start]), _text(shown[start:end]), pictures(shown[start:end])


def edited(shown: Sequence[Shown], index: int, text: str) -> list[Shown]:
    """The conversation up to message `index`, the text of a question, which is now `text`."""
    if shown[index]["role"] != "user":
        raise UsageError("only questions can be edited")
    return with_question(shown[:index], text, [])


def asked(
    shown: Sequence[Shown], system: str | None = None
) -> tuple[list[Message], list["Image.Image"]]:
    """The messages for a model, `system` first if it says anything, and all pictures.

    Of a question that was stopped before it had any answer, the pictures alone are left, to the
    next one.
    """
    messages = [said("system", system.strip())] if system and system.strip() else []
    for role, group in groupby(shown, key=lambda message: str(message["role"])):
        turn = list(group)
        messages.append(said(role, _text(turn), pictures=len(pictures(turn))))
    files = pictures(shown)
    if len(files) > MOST_PICTURES:
        raise UsageError(f"there are {len(files)} pictures, and {MOST_PICTURES} are the most")
    return messages, [picture_of(file) for file in files]


def pictures(shown: Sequence[Shown]) -> list[str]:
    """The files of the pictures that were shown, in order."""
    return [part["file"]["path"] for part in _parts(shown) if part["type"] == "file"]


def written(shown: Sequence[Shown], system: str | None = None) -> str:
    """The conversation as JSON, see `transcript`; UsageError for an empty one."""
    if not shown:
        raise UsageError("there is no conversation to save yet")
    if shown[-1]["role"] == "user":
        shown = without_question(shown)[0]
    return as_json(*asked(shown, system))


def read(text: str, folder: Path) -> tuple[list[Shown], str]:
    """What `written` wrote: the conversation, its pictures as new files in `folder`, and what the
    system prompt was. UsageError for anything else."""
    messages, images = from_json(text)
    if len(images) > MOST_PICTURES:
        raise UsageError(f"it has {len(images)} pictures, and {MOST_PICTURES} are the most")
    if any(image.width * image.height > MOST_PIXELS for image in images):
        raise UsageError(f"a picture in it has more than {MOST_PIXELS:,} pixels")
    pictures = iter(images)
    place = Path(tempfile.mkdtemp(dir=folder))
    shown, system, count = [], "", 0
    for message in messages:
        text = " ".join(part["text"] for part in message["content"] if part["type"] == "text")
        if message["role"] == "system":
            system = text
        elif message["role"] == "assistant":
            shown.append(answer(text))
        else:
            files = []
            for _ in [part for part in message["content"] if part["type"] == "image"]:
                count += 1
                files.append(str(place / f"picture-{count}.png"))
                next(pictures).save(files[-1])
            shown += question(text, files)
    return shown, system


def _last_question(shown: Sequence[Shown]) -> tuple[int, int]:
    """Where the messages of the last question start and end; both 0 where there is none."""
    end = len(shown)
    while end and shown[end - 1]["role"] != "user":
        end -= 1
    start = end
    while start and shown[start - 1]["role"] == "user":
        start -= 1
    return start, end


def _text(turn: Sequence[Shown]) -> str:
    """What was said in one turn: its last text."""
    texts = [str(part["text"]) for part in _parts(turn) if part["type"] == "text"]
    return texts[-1] if texts else ""


def _parts(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    return [part for message in shown for part in message["content"]]
