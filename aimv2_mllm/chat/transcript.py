"""A conversation as JSON, out and in, its pictures inside: messages as OpenAI's chat API has them.

Refuses, with its place, what is no such conversation, and pictures that lie elsewhere: nothing is
fetched.
"""

import base64
import binascii
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.pictures.images import decoded
from aimv2_mllm.data.talks.conversations import Message
from aimv2_mllm.errors import UsageError, show

if TYPE_CHECKING:
    from PIL import Image

FORMAT = "aimv2_mllm conversation 1"
ROLES = ("system", "user", "assistant")
DATA_URL = "data:image/"
MOST_BYTES = 256 * 2**20  # of a file; a photograph of 12 megapixels has 30 MB as PNG


def as_json(messages: Sequence[Message], images: Sequence["Image.Image"]) -> str:
    """The conversation with its `images`, one per image part, as PNG."""
    pictures = iter(images)

    def written(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return {"type": "text", "text": part["text"]}
        buffer = io.BytesIO()
        next(pictures).save(buffer, "PNG")
        content = base64.b64encode(buffer.getvalue()).decode("ascii")
        return {"type": "image_url", "image_url": {"url": f"{DATA_URL}png;base64,{content}"}}

    said = [
        {"role": message["role"], "content": [written(part) for part in message["content"]]}
        for message in messages
    ]
    return json.dumps({"format": FORMAT, "messages": said}, ensure_ascii=False, indent=1) + "\n"


def from_json(text: str) -> tuple[list[Message], list["Image.Image"]]:
    """The messages and the pictures that `as_json` wrote, or OpenAI's with `data:` pictures.

    UsageError for anything else; a conversation ends with an answer, or is empty.
    """
    if len(text) > MOST_BYTES:
        raise UsageError(f"it has {len(text):,} bytes, and {MOST_BYTES:,} are the most")
    try:
        whole = json.loads(text)
    except ValueError as error:
        raise UsageError(f"it is not JSON ({error})") from None
    except RecursionError:
        raise UsageError("it is not JSON of a conversation: it is nested too deeply") from None
    if not isinstance(whole, dict) or not isinstance(whole.get("messages"), list):
        raise UsageError('it is no conversation: it has no list "messages"')
    if whole.get("format", FORMAT) != FORMAT:
        raise UsageError(f"its format is {show(whole['format'])}, must be {FORMAT!r}")
    messages: list[Message] = []
    images: list[Image.Image] = []
    for number, message in enumerate(whole["messages"]):
        messages.append(_message(message, f"messages.{number}", images))
    roles = [message["role"] for message in messages]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if talk != ["user", "assistant"] * (len(talk) // 2):
        raise UsageError("messages: after a system prompt, if any, user and assistant take turns")
    return messages, images


def _message(message: Any, place: str, images: list["Image.Image"]) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise UsageError(f"{place}: its role must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise UsageError(f"{place}.content: must be a text or a list of parts")
    parts = [
        _part(part, f"{place}.content.{number}", images) for number, part in enumerate(content)
    ]
    if message["role"] != "user" and any(part["type"] == "image" for part in parts):
        raise UsageError(f"{place}.content: only the user shows pictures")
    return {"role": message["role"], "content": parts}


def _part(part: Any, place: str, images: list["Image.Image"]) -> dict[str, Any]:
    match part:
        case {"type": "text", "text": str(text)}:
            return {"type": "text", "text": text}
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            images.append(_picture(url, place))
            return {"type": "image"}
    raise UsageError(f"{place}: must be a text, or an image_url with a url")


def _picture(url: str, place: str) -> "Image.Image":
    head, mark, content = url.partition(";base64,")
    if not head.startswith(DATA_URL) or not mark:
        raise UsageError(f"{place}: its picture must be inside, as a {DATA_URL}…;base64 URL")
    try:
        return decoded(io.BytesIO(base64.b64decode(content, validate=True)))
    except (Unusable, binascii.Error) as error:
        raise UsageError(f"{place}: its picture cannot be read ({error})") from None
