"""A conversation at a keyboard: lines come in, answers go to stdout, and all else to stderr.

Through a pipe every question gets one line of answer, and no prompts are printed.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

from PIL import Image

from aimv2_mllm.chat.chatbot import Chatbot
from aimv2_mllm.chat.session import ChatSession, Counts, Reply
from aimv2_mllm.chat.transcript import as_json, from_json
from aimv2_mllm.data.pictures.images import open_image
from aimv2_mllm.data.talks.conversations import Message, said
from aimv2_mllm.errors import UsageError
from aimv2_mllm.files import demand_place, write
from aimv2_mllm.model.sampling import GREEDY, Sampling
from aimv2_mllm.narration import note, warn


def talk(
    bot: Chatbot,
    pictures: Sequence[Image.Image],
    max_new_tokens: int = 64,
    *,
    system: str | None = None,
    sampling: Sampling = GREEDY,
) -> None:
    """Answer what is typed, or what comes through a pipe, until it ends.

    What is no answer goes to stderr. Ctrl-C stops an answer; at a question it ends the whole.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    here = Keyboard(
        bot,
        pictures,
        system,
        show=terminal,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
    )
    if terminal:
        note("Ask about the picture; /help shows more.")
    for line in _lines(terminal):
        command, _, rest = line.partition(" ")
        try:
            if command.startswith("/"):
                here.obey(command, rest.strip())
            else:
                here.ask(line)
        except _Quit:
            return
        except UsageError as error:
            warn(str(error))


class _Quit(Exception):
    """The conversation is to end."""


class Keyboard:
    """One conversation at the terminal, and what its commands do to it."""

    def __init__(
        self,
        bot: Chatbot,
        pictures: Sequence[Image.Image],
        system: str | None,
        *,
        show: bool,
        max_new_tokens: int,
        sampling: Sampling,
    ) -> None:
        self._session, self._show = ChatSession(bot), show
        self._max_new_tokens, self._sampling = max_new_tokens, sampling
        self._system = [] if system is None else [said("system", system)]
        self._first = list(pictures)  # with which the conversation begins
        self._counts: Counts | None = None
        self._messages: list[Message] = [*self._system]
        self._images: list[Image.Image] = []
        self._waiting = [*self._first]  # shown with the next question
        self._tries = 0  # how often the last question was asked before
        if self._system:
            bot.prompter.demand_system()

    def obey(self, command: str, rest: str) -> None:
        """Do what `command` says; UsageError where it cannot be done."""
        if command not in COMMANDS:
            raise UsageError(f"there is no command {command}; /help shows those there are")
        COMMANDS[command][1](self, rest)

    def ask(self, text: str, tries: int = 0) -> None:
        """Print the answer, and remember it; `tries` is how often the question was asked before."""
        messages = [*self._messages, said("user", text, pictures=len(self._waiting))]
        images = [*self._images, *self._waiting]
        sampling = self._sampling
        if tries and sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + tries)
        answer = self._shown(messages, images, sampling)
        if answer is not None:
            self._messages = [*messages, said("assistant", answer)]
            self._images, self._waiting, self._tries = images, [], tries

    def _shown(
        self, messages: list[Message], images: list[Image.Image], sampling: Sampling
    ) -> str | None:
        """The answer, as far as it was let come; None where that is not at all."""
        stop = threading.Event()
        most = self._max_new_tokens
        reply = self._session.stream(
            messages, images, max_new_tokens=most, sampling=sampling, stop=stop
        )
        self._counts, answer = reply.counts, ""
        with _ctrl_c_sets(stop) if self._show else nullcontext():
            for piece in _until_interrupted(reply, stop):
                answer += piece
                if self._show:
                    print(piece, end="", flush=True)
        # Through a pipe: a line each.
        print("" if self._show else answer.replace("\n", " "), flush=True)
        if not stop.is_set():
            return answer
        note("(stopped)" if answer else "(stopped; the question is forgotten)")
        return answer or None

    def clear(self, _: str) -> None:
        """Begin anew, with the pictures of the beginning."""
        self._messages, self._images = [*self._system], []
        self._waiting, self._tries = [*self._first], 0

    def image(self, file: str) -> None:
        """Begin anew with another picture."""
        self._first = [open_image(file)]
        self.clear("")

    def add(self, file: str) -> None:
        """Show one more picture with the next question."""
        self._waiting.append(open_image(file))

    def undo(self, _: str = "") -> str:
        """Take the last question back with its answer; its text."""
        if len(self._messages) == len(self._system):
            raise UsageError("nothing has been asked yet")
        question = self._messages[-2]["content"]
        count = sum(part["type"] == "image" for part in question)
        kept = len(self._images) - count
        self._waiting = [*self._images[kept:], *self._waiting]
        self._messages, self._images = self._messages[:-2], self._images[:kept]
        return "".join(part.get("text", "") for part in question)

    def retry(self, _: str) -> None:
        """Answer the last question again; with a seed, by the next one."""
        if not self._sampling.temperature:
            note("(the likeliest answer stays the same; --temperature lets it vary)")
        self._again(None, self._tries + 1)

    def edit(self, text: str) -> None:
        """Ask the last question in other words."""
        if not text:
            raise UsageError("/edit needs the new words of the last question")
        self._again(text, 0)

    def _again(self, text: str | None, tries: int) -> None:
        before = self._messages, self._images, self._waiting
        asked = self.undo()
        try:
            self.ask(asked if text is None else text, tries)
        except UsageError:
            self._messages, self._images, self._waiting = before
            raise

    def save(self, file: str) -> None:
        """Write the conversation as JSON."""
        demand_place(Path(file), "talk.json")
        text = as_json(self._messages, self._images)
        write(Path(file), lambda path: path.write_text(text, encoding="utf-8"))

    def load(self, file: str) -> None:
        """Go on with a conversation that was saved."""
        try:
            messages, images = from_json(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{file}: cannot be read ({error.strerror})") from None
        except ValueError as error:  # not UTF-8, or no conversation
            raise UsageError(f"{file}: {error}") from None
        self._system = [one for one in messages[:1] if one["role"] == "system"]
        self._messages, self._images, self._waiting = messages, images, []

    def counts(self, _: str) -> None:
        """Say what the last answer took."""
        note(f"({self._counts})" if self._counts else "(nothing has been asked yet)")

    def help(self, _: str) -> None:
        """Say what commands there are."""
        note("\n".join(f"{name:8}{what}" for name, (what, _) in COMMANDS.items()))

    def quit(self, _: str) -> None:
        """End the conversation."""
        raise _Quit


COMMANDS: dict[str, tuple[str, Callable[[Keyboard, str], object]]] = {
    "/image": ("FILE  begin anew with another picture", Keyboard.image),
    "/add": ("FILE  show one more picture with the next question", Keyboard.add),
    "/undo": ("      take back the last question and its answer", Keyboard.undo),
    "/retry": ("      answer the last question again", Keyboard.retry),
    "/edit": ("TEXT  ask the last question in other words", Keyboard.edit),
    "/clear": ("      begin anew with the same picture", Keyboard.clear),
    "/save": ("FILE  write the conversation, pictures too, as JSON", Keyboard.save),
    "/load": ("FILE  go on with a saved conversation", Keyboard.load),
    "/counts": ("      tokens and seconds of the last answer", Keyboard.counts),
    "/help": ("      show these commands", Keyboard.help),
    "/quit": ("      end, as Ctrl-D does; Ctrl-C stops an answer", Keyboard.quit),
}


@contextmanager
def _ctrl_c_sets(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C sets `stop`, so that what was computed is kept; the next interrupts."""

    def handle(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _until_interrupted(reply: Reply, stop: threading.Event) -> Iterator[str]:
    try:
        yield from reply
    except KeyboardInterrupt:
        if not stop.is_set():  # nobody is there to ask on
            raise


def _lines(terminal: bool) -> Iterable[str]:
    """What is typed, or what comes through a pipe, without empty lines, until it ends."""
    if terminal:
        with suppress(ImportError):  # Pythons without it still read lines
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
