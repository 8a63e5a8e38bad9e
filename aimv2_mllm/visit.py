"""A conversation as a page shows it, and the same as a model is asked it.

Owns what retry, undo and edit make of it, and the limits of a visitor's pictures. Refuses a picture
above them before it is decoded, by the name that the visitor knows and never by its place here.
"""

import tempfile
from collections.abc import Sequence
from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.images import as_rgb, opened, upright
from aimv2_mllm.errors import UsageError
from aimv2_mllm.prompts import Message, said
from aimv2_mllm.transcript import as_json, from_json

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
        with Path(path).open("rb") as stream, opened(stream) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise Unusable(
                    "too_large",
                    f"has {picture.width:,} x {picture.height:,} pixels, and {MOST_PIXELS:,} are "
                    "the most here; scale it down first",
                )
            picture.load()
            return as_rgb(upright(picture))
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
    count = len(files) + sum(len(_files(message)) for message in shown)
    if count > MOST_PICTURES:
        raise UsageError(f"that would be {count} pictures, and {MOST_PICTURES} are the most")
    for file in files:
        picture_of(file)
    return [*shown, question(text, files)]


def question(text: str, files: Sequence[str]) -> Shown:
    """A question with its pictures before it, as a page shows it."""
    pictures = [
        {"type": "file", "file": {"path": file, "mime_type": guess_type(file)[0]}} for file in files
    ]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def answer(text: str) -> Shown:
    """An answer as a page shows it."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def without_answer(shown: Sequence[Shown]) -> list[Shown]:
    """The conversation up to its last question, to be answered again."""
    last = _last_question(shown)
    if last is None:
        raise UsageError("nothing was asked yet")
    return list(shown[: last + 1])


def without_question(shown: Sequence[Shown]) -> tuple[list[Shown], str, list[str]]:
    """The conversation before its last question, and of this the text and the pictures."""
    last = _last_question(shown)
    if last is None:
        return [], "", []
    return list(shown[:last]), _text(shown[last]), _files(shown[last])


def edited(shown: Sequence[Shown], index: int, text: str) -> list[Shown]:
    """The conversation up to message `index`, a question, which now says `text` of the same
    pictures."""
    if shown[index]["role"] != "user":
        raise UsageError("only questions can be edited")
    return with_question(shown[:index], text, _files(shown[index]))


def asked(shown: Sequence[Shown], system: str = "") -> tuple[list[Message], list["Image.Image"]]:
    """The messages for a model, `system` first if it says anything, and all pictures.

    A question that was stopped before it had any answer is left out; its pictures go to the next.
    """
    messages = [said("system", system.strip())] if system.strip() else []
    files: list[str] = []
    waiting: list[str] = []
    for number, message in enumerate(shown):
        if message["role"] != "user":
            messages.append(said("assistant", _text(message)))
            continue
        waiting += _files(message)
        if number + 1 < len(shown) and shown[number + 1]["role"] == "user":
            continue
        messages.append(said("user", _text(message), pictures=len(waiting)))
        files, waiting = files + waiting, []
    if len(files) > MOST_PICTURES:
        raise UsageError(f"there are {len(files)} pictures, and {MOST_PICTURES} are the most")
    return messages, [picture_of(file) for file in files]


def pictures(shown: Sequence[Shown]) -> list[str]:
    """The files of the pictures that were shown, in order."""
    return [file for message in shown for file in _files(message)]


def written(shown: Sequence[Shown], system: str = "") -> str:
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
            shown.append(question(text, files))
    return shown, system


def _last_question(shown: Sequence[Shown]) -> int | None:
    numbers = [number for number, message in enumerate(shown) if message["role"] == "user"]
    return numbers[-1] if numbers else None


def _text(message: Shown) -> str:
    parts = [part["text"] for part in message["content"] if part["type"] == "text"]
    return "\n".join(parts)


def _files(message: Shown) -> list[str]:
    return [part["file"]["path"] for part in message["content"] if part["type"] == "file"]
