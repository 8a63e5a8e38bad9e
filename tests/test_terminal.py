"""The conversation at a keyboard, and what its commands do to it."""

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from test_chat import ASK, PICTURE, at_hand, bot, llava, sheet  # noqa: F401 (fixtures)

from aimv2_mllm.__main__ import main
from aimv2_mllm.chat.chat import answer
from aimv2_mllm.chat.chatbot import Chatbot
from aimv2_mllm.chat.terminal import COMMANDS
from aimv2_mllm.chat.transcript import from_json
from aimv2_mllm.data.talks.conversations import Message, said, turn
from aimv2_mllm.model.sampling import Sampling

pytestmark = pytest.mark.usefixtures("at_hand")
WORDS = {"max_new_tokens": 8}


@pytest.fixture
def piped(
    llava: Path,  # noqa: F811
    sheet: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """The lines of stdout, and stderr, that come of lines through a pipe and further words."""

    def call(lines: list[str], *words: str) -> tuple[list[str], str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        assert main(["chat", str(llava), "--image", sheet, "--max-tokens", "8", *words]) == 0
        out, err = capsys.readouterr()
        assert out == "" or out.endswith("\n")
        return out.split("\n")[:-1], err

    return call


def line(bot: Chatbot, messages: list[Message], num_pictures: int = 1, **words: Any) -> str:  # noqa: F811
    return answer(bot, messages, [PICTURE] * num_pictures, **WORDS, **words).replace("\n", " ")


def second(bot: Chatbot, question: str = "where is it") -> list[Message]:  # noqa: F811
    first = answer(bot, ASK, [PICTURE], **WORDS)
    return [*turn("what is it", first, image=True), said("user", question)]


def test_a_pipe_gets_a_line_per_question(piped: Any, bot: Chatbot, sheet: str) -> None:  # noqa: F811
    lines = ["what is it", "", "where is it", "/clear", "what is it", "/help", "/nonsense"]
    lines += ["/image nowhere.png", f"/image {sheet}", "what is it", "a <image>", "/quit", "never"]
    out, err = piped(lines)
    first = line(bot, ASK)
    assert out == [first, line(bot, second(bot)), first, first]
    assert all(command in err for command in COMMANDS)
    assert "aimv2-mllm: there is no command /nonsense" in err
    assert "aimv2-mllm: nowhere.png: there is no such picture" in err
    assert "aimv2-mllm: '<image>' is a special token" in err


def test_a_question_can_be_taken_back_and_asked_otherwise(piped: Any, bot: Chatbot) -> None:  # noqa: F811
    out, err = piped(["/undo", "what is it", "where", "/undo", "where is it", "/edit the red one"])
    expected = [ASK, second(bot, "where"), second(bot), second(bot, "the red one")]
    assert out == [line(bot, messages) for messages in expected]
    assert err == "aimv2-mllm: nothing has been asked yet\n"
    # Taken back wholly, the first question brings the picture again.
    assert piped(["where", "/undo", "what is it"])[0][1] == line(bot, ASK)
    assert piped(["where", "/edit what is it"])[0][1] == line(bot, ASK)
    assert "/edit needs the new words" in piped(["where", "/edit"])[1]


def test_a_retry_says_the_same_or_draws_anew(piped: Any, bot: Chatbot) -> None:  # noqa: F811
    out, err = piped(["what is it", "/retry"])
    assert out == [line(bot, ASK)] * 2
    assert "the likeliest answer stays the same" in err
    drawn = ["--temperature", "1.5", "--seed", "7"]
    out, err = piped(["what is it", "/retry", "/retry"], *drawn)
    seeds = [Sampling(temperature=1.5, seed=seed) for seed in (7, 8, 9)]
    assert out == [line(bot, ASK, sampling=sampling) for sampling in seeds]
    assert (len(set(out)) > 1, err) == (True, "")
    assert piped(["what is it", "/retry", "/retry"], *drawn)[0] == out


def test_a_question_that_cannot_be_asked_leaves_all_as_it_was(piped: Any, bot: Chatbot) -> None:  # noqa: F811
    out, err = piped(["what is it", f"/edit {'what ' * 200}", "where is it"])
    assert out == [line(bot, ASK), line(bot, second(bot))]
    assert "can hold 96" in err


def test_one_more_picture_comes_with_the_next_question(
    piped: Any,
    bot: Chatbot,  # noqa: F811
    sheet: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "letter.png").write_text("Dear reader")
    lines = ["what is it", f"/add {tmp_path / 'letter.png'}", f"/add {sheet}", "where is it"]
    out, err = piped(lines)
    messages = second(bot)
    messages[-1]["content"].insert(0, {"type": "image"})
    assert out[1] == line(bot, messages, 2)
    assert err == f"aimv2-mllm: {tmp_path / 'letter.png'}: is not a picture; give a PNG, JPEG, " \
        "WebP, GIF or TIFF file\n"  # fmt: skip


def test_a_conversation_is_saved_and_gone_on_with(piped: Any, bot: Chatbot, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "talk.json"
    piped(["what is it", f"/save {file}"])
    assert [m["role"] for m in json.loads(file.read_text())["messages"]] == ["user", "assistant"]
    assert piped([f"/load {file}", "where is it"])[0] == [line(bot, second(bot))]
    lines = [f"/load {tmp_path}", "/load absent.json", f"/load {__file__}", "/save no/talk.json"]
    err = piped(lines)[1].splitlines()
    for said_line, why in zip(
        err, ["cannot be read", "cannot be read", "it is not JSON", "no folder no"], strict=True
    ):
        assert why in said_line


def test_what_an_answer_took_is_told_when_asked(piped: Any) -> None:
    err = piped(["/counts", "what is it", "where is it", "/counts"])[1].splitlines()
    assert err[0] == "(nothing has been asked yet)"
    assert "(4 image, " in err[1]
    assert "cached); answer 8 tokens, the first after" in err[1]


def test_an_answer_ends_before_what_it_is_to_stop_at(piped: Any, bot: Chatbot) -> None:  # noqa: F811
    whole = line(bot, ASK)
    stop = whole[3:5]
    assert piped(["what is it"], "--stop", stop, "--stop", "never said")[0] == [
        whole.partition(stop)[0].strip()
    ]


def test_a_system_prompt_is_refused_where_there_is_no_place_for_it(
    llava: Path,  # noqa: F811
    sheet: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words in (["--prompt", "what is it"], []):
        assert main(["chat", str(llava), "--image", sheet, "--system", "Be brief.", *words]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "no place for a system prompt" in err


def test_ctrl_c_at_a_question_ends_with_130(
    llava: Path,  # noqa: F811
    sheet: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert main(["chat", str(llava), "--image", sheet]) == 130
    assert capsys.readouterr() == ("", "aimv2-mllm: interrupted\n")


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_an_answer_stops_that_answer_alone(
    times: int,
    llava: Path,  # noqa: F811
    sheet: str,  # noqa: F811
    bot: Chatbot,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The second Ctrl-C does not wait until a token is there."""
    forward, runs = bot.model.get_decoder().forward, list[int]()

    def slow(**words: Any) -> Any:
        runs.append(1)
        if len(runs) == 4:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return forward(**words)

    monkeypatch.setattr(bot.model.get_decoder(), "forward", slow)
    monkeypatch.setattr(bot.model.generation_config, "eos_token_id", None)
    file = tmp_path / "talk.json"
    lines = iter(["what is it", "where is it", f"/save {file}"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    before = signal.getsignal(signal.SIGINT)
    assert main(["chat", str(llava), "--image", sheet, "--max-tokens", "8"]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    out, err = capsys.readouterr()
    assert "(stopped)" in err
    monkeypatch.setattr(bot.model.get_decoder(), "forward", forward)
    messages, _ = from_json(file.read_text())
    texts = [message["content"][0]["text"] for message in messages[1::2]]
    assert out == f"{texts[0]}\n{texts[1]}\n"
    whole = answer(bot, ASK, [PICTURE], **WORDS)
    assert whole.startswith(texts[0])
    assert 0 < len(texts[0]) < len(whole)
    assert texts[1] == answer(bot, messages[:3], [PICTURE], **WORDS)


def test_ctrl_c_through_a_pipe_ends_with_130(
    llava: Path,  # noqa: F811
    sheet: str,  # noqa: F811
    bot: Chatbot,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(**_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.StringIO("what is it\nwhere is it\n"))
    monkeypatch.setattr(bot.model.get_decoder(), "forward", interrupt)
    assert main(["chat", str(llava), "--image", sheet]) == 130
