"""A conversation as a page shows it: what it becomes for a model, and the limits of pictures."""

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from aimv2_mllm.chat.transcript import as_json
from aimv2_mllm.data.talks.conversations import said
from aimv2_mllm.errors import UsageError
from aimv2_mllm.visitors import visit

RED, BLUE = (200, 10, 10), (10, 10, 200)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two pictures, red and blue."""
    for name, colour in (("red", RED), ("blue", BLUE)):
        Image.new("RGB", (20, 10), colour).save(tmp_path / f"{name}.png")
    return [str(tmp_path / "red.png"), str(tmp_path / "blue.png")]


def test_a_conversation_becomes_messages_and_its_pictures_in_order(files: list[str]) -> None:
    shown = visit.with_question([], "What?", files[:1])
    shown = visit.with_question([*shown, visit.answer("red")], "And this?", files[1:])
    messages, images = visit.asked(shown, "Be short.")
    assert messages == [
        said("system", "Be short."),
        said("user", "What?", pictures=1),
        said("assistant", "red"),
        said("user", "And this?", pictures=1),
    ]
    assert [image.getpixel((0, 0)) for image in images] == [RED, BLUE]


@pytest.mark.parametrize("system", ["", "  ", None])
def test_an_empty_system_prompt_is_none(files: list[str], system: str) -> None:
    assert visit.asked(visit.with_question([], "What?", []), system)[0] == [said("user", "What?")]


def test_a_question_that_was_stopped_leaves_its_pictures_to_the_next(files: list[str]) -> None:
    shown = [*visit.question("Stopped?", files[:1]), *visit.question("Now?", files[1:])]
    messages, images = visit.asked(shown)
    assert messages == [said("user", "Now?", pictures=2)]
    assert len(images) == 2


def test_retry_undo_and_edit_keep_the_pictures(files: list[str]) -> None:
    first, second = visit.question("One?", files[:1]), visit.question("Two?", files[1:])
    shown = [*first, visit.answer("1"), *second, visit.answer("2")]
    assert visit.without_answer(shown) == shown[:-1]
    assert visit.without_question(shown) == (shown[:3], "Two?", files[1:])
    assert visit.edited(shown, 1, "Another?") == visit.question("Another?", files[:1])
    assert visit.edited(shown, 4, "Third?") == [*shown[:3], *visit.question("Third?", files[1:])]
    assert visit.pictures(shown) == files


def test_a_question_may_also_be_one_message(files: list[str]) -> None:
    content = [part for message in visit.question("What?", files) for part in message["content"]]
    whole = visit.asked([{"role": "user", "content": content}])[0]
    assert whole == visit.asked(visit.question("What?", files))[0]


def test_nothing_can_be_done_where_nothing_was_asked(files: list[str]) -> None:
    assert visit.without_question([]) == ([], "", [])
    with pytest.raises(UsageError, match="nothing was asked"):
        visit.without_answer([])
    with pytest.raises(UsageError, match="no conversation to save"):
        visit.written([])
    with pytest.raises(UsageError, match="only questions"):
        visit.edited([*visit.question("a", []), visit.answer("b")], 1, "c")


@pytest.mark.parametrize(
    ("text", "count", "words"),
    [(" ", 0, "is empty"), ("a" * 20_001, 0, "20,001 letters"), ("a", 17, "17 pictures, and 16")],
)
def test_a_question_has_limits(files: list[str], text: str, count: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        visit.with_question([], text, files[:1] * count)


def bomb(path: Path, side: int) -> Path:
    """A PNG of a few bytes that says it is so large."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize(("side", "words"), [(5000, "16,000,000 are the most"), (50_000, "most")])
def test_a_picture_that_says_it_is_large_is_refused_by_its_name(
    tmp_path: Path, side: int, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        visit.picture_of(bomb(tmp_path / "bomb.png", side))
    assert str(caught.value).startswith("bomb.png: ")


def test_what_is_no_picture_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("words")
    with pytest.raises(UsageError, match=r"^notes\.png: is not a picture"):
        visit.with_question([], "What?", [str(tmp_path / "notes.png")])
    with pytest.raises(UsageError, match=r"^gone\.png: cannot be read"):
        visit.picture_of(tmp_path / "gone.png")
    with pytest.raises(UsageError, match="no picture yet"):
        visit.picture_of(None)


def test_a_conversation_comes_back_from_json_as_it_was(files: list[str], tmp_path: Path) -> None:
    shown = [*visit.question("What?", files), visit.answer("red and blue")]
    text = visit.written([*shown, *visit.question("Not answered?", [])], "Be short.")
    assert str(tmp_path) not in text
    again, system = visit.read(text, tmp_path)
    assert system == "Be short."
    assert [message["role"] for message in again] == ["user"] * 3 + ["assistant"]
    messages, images = visit.asked(again, system)
    expected, originals = visit.asked(shown, "Be short.")
    assert messages == expected
    assert [image.tobytes() for image in images] == [image.tobytes() for image in originals]


def test_json_with_too_much_in_it_is_refused(tmp_path: Path) -> None:
    talk = [said("user", "What?", pictures=17), said("assistant", "many")]
    more = as_json(talk, [Image.new("RGB", (2, 2))] * 17)
    with pytest.raises(UsageError, match="17 pictures"):
        visit.read(more, tmp_path)
    with pytest.raises(UsageError, match="not JSON"):
        visit.read("{", tmp_path)
