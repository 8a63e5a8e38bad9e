"""A conversation as JSON: what comes back is what was said, and nothing else is let in."""

import base64
import json
import zlib
from typing import Any

import pytest
from PIL import Image
from test_images import png_header
from tiny_towers import picture

from aimv2_mllm.chat.transcript import as_json, from_json
from aimv2_mllm.data.talks.conversations import Message, said
from aimv2_mllm.errors import UsageError

PICTURES = [picture(60, 40), picture(30, 30)]
TALK: list[Message] = [
    said("system", "Be brief."),
    said("user", 'Was ist das? 这是什么? "<b>"\n', pictures=1),
    said("assistant", "A cat."),
    {
        "role": "user",
        "content": [{"type": "text", "text": "And "}, {"type": "image"}],
    },
    said("assistant", ""),
]


def test_a_conversation_comes_back_with_its_pictures() -> None:
    messages, images = from_json(as_json(TALK, PICTURES))
    assert messages == TALK
    assert [image.tobytes() for image in images] == [image.tobytes() for image in PICTURES]
    assert from_json(as_json([], [])) == ([], [])


def url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def test_a_conversation_of_openai_s_is_read() -> None:
    whole = json.loads(as_json(TALK, PICTURES))
    del whole["format"]
    whole["messages"][0]["content"] = "Be brief."
    whole["messages"][1]["name"] = "somebody"
    messages, images = from_json(json.dumps(whole))
    assert (messages, len(images)) == (TALK, 2)


USER = {"role": "user", "content": "x"}
REMOTE = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}


def shown(content: bytes) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url(content)}}]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([USER], "user and assistant take turns"),
        ([{"role": "assistant", "content": "x"}, USER], "take turns"),
        ([{"role": "tool", "content": "x"}], r"messages\.0: its role must be one of system, user"),
        (["x"], r"messages\.0: its role"),
        ([{"role": "user", "content": 3}], r"messages\.0\.content: must be a text or a list"),
        ([{"role": "user", "content": [{"type": "audio"}]}], r"content\.0: must be a text, or an"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\.0: must be a text, or an"),
        ([{"role": "user", "content": [REMOTE]}], r"content\.0: its picture must be inside"),
        ([{"role": "user", "content": shown(b"Dear reader")}], "cannot be read .is not a picture"),
        (
            [{"role": "user", "content": shown(png_header(30_000, 30_000))}],
            "more than 64,000,000 pixels",
        ),
        ([{"role": "assistant", "content": shown(zlib.compress(b""))}], "cannot be read"),
        (3, 'it has no list "messages"'),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(messages: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why) as error:
        from_json(json.dumps({"messages": messages}))
    assert "\n" not in str(error.value)


def test_only_the_user_shows_pictures() -> None:
    whole = json.loads(as_json(TALK, PICTURES))
    whole["messages"][2]["content"] = whole["messages"][1]["content"]
    with pytest.raises(UsageError, match=r"messages\.2\.content: only the user shows pictures"):
        from_json(json.dumps(whole))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is not JSON"),
        ("{", "it is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "it is no conversation"),
        ('{"format": "another", "messages": []}', 'its format is "another", must be'),
    ],
)
def test_what_is_no_json_of_ours_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        from_json(text)


def test_a_picture_whose_letters_are_no_base64_is_refused() -> None:
    text = as_json(TALK, PICTURES).replace(";base64,", ";base64,*")
    with pytest.raises(UsageError, match=r"messages\.1\.content\.0: its picture cannot be read"):
        from_json(text)


def test_the_pictures_of_a_talk_are_rgb() -> None:
    grey = Image.new("L", (20, 20), 7)
    [image] = from_json(as_json(TALK[1:3], [grey]))[1]
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (7, 7, 7))
