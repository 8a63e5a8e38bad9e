"""A conversation at a keyboard: lines come in, answers go to stdout, and all else to stderr.

Through a pipe every question gets one line of answer, and no prompts are printed.
"""

import sys
from collections.abc import Iterable

from PIL import Image

from aimv2_mllm.chat import stream
from aimv2_mllm.chatbot import Chatbot
from aimv2_mllm.data.conversations import turn
from aimv2_mllm.data.images import open_image
from aimv2_mllm.errors import UsageError
from aimv2_mllm.prompts import Message

COMMANDS = {
    "/image": "FILE  talk about another picture, from the start",
    "/reset": "      forget what was said about this picture",
    "/help": "       show these commands",
    "/quit": "       end, as Ctrl-D does",
}


def talk(bot: Chatbot, picture: Image.Image, max_new_tokens: int) -> None:
    """Answer what is typed, or what comes through a pipe, until it ends.

    What is no answer goes to stderr. Ctrl-C stops an answer; at a question it ends the whole.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    history: list[Message] = []
    if terminal:
        _note("Ask about the picture; /help shows more.")
    for line in _lines(terminal):
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                break
            if command == "/help":
                _note("\n".join(f"{name} {what}" for name, what in COMMANDS.items()))
            elif command == "/reset":
                history = []
            elif command == "/image":
                picture, history = open_image(rest.strip()), []
            elif command.startswith("/"):
                raise UsageError(f"there is no command {command}; /help shows those there are")
            else:
                history += _ask(bot, history, line, picture, max_new_tokens, show=terminal)
        except UsageError as error:
            _note(f"aimv2-mllm: {error}")


def _lines(terminal: bool) -> Iterable[str]:
    """What is typed, or what comes through a pipe, without empty lines, until it ends."""
    if terminal:
        import contextlib

        with contextlib.suppress(ImportError):  # Pythons without it still read lines
            import readline  # noqa: F401 (its import gives input() a history and cursor keys)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            raise UsageError("what comes in is not UTF-8 text") from None
        if line:
            yield line


def _ask(
    bot: Chatbot,
    history: list[Message],
    question: str,
    picture: Image.Image,
    max_new_tokens: int,
    *,
    show: bool,
) -> list[Message]:
    """The question and its answer, which is printed; nothing when Ctrl-C stopped the answer."""
    asked = turn(question, "", image=not history)[:1]
    pieces = stream(bot, [*history, *asked], [picture], max_new_tokens=max_new_tokens)
    said = ""
    try:
        for piece in pieces:
            said += piece
            if show:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
        if not show:  # nobody is there to ask on
            raise
        print(flush=True)
        _note("(stopped; the question is forgotten)")
        return []
    print("" if show else said.replace("\n", " "), flush=True)  # through a pipe: a line each
    return turn(question, said, image=not history)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
