"""A conversation as the tokenizer's own chat template writes it, and where in that text the
assistant speaks.

Refuses a template that does not tell where answers begin and end, or does not write a picture.
"""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import jinja2

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.talks.conversations import Message, turn
from aimv2_mllm.errors import UsageError
from aimv2_mllm.marks import IMAGE_TOKEN


class Written(NamedTuple):
    """A conversation as text, and the parts of it, from and to a character, that are supervised."""

    text: str
    spans: list[tuple[int, int]]


def as_text(message: Message) -> str:
    """The content of a message with `<image>` where a picture is.

    As LLaVA has it, a picture alone comes first, on a line of its own.
    """
    parts = message["content"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if len(parts) - len(texts) == 1:
        return f"{IMAGE_TOKEN}\n{''.join(texts).strip()}".strip()
    return "".join(IMAGE_TOKEN if part["type"] == "image" else part["text"] for part in parts)


PROBE = [*turn("q0z?", "a0z.", image=True), *turn("q1z?", "a1z."), *turn("q2z?", "a2z.")]
# Before a template that takes text: what `as_text` makes of a message's parts.
PARTS = (
    "{%- set talk = namespace(messages=[]) -%}\n"
    "{%- for message in messages -%}\n"
    "{%- if message.content is undefined or message.content is string -%}\n"
    "{%- set talk.messages = talk.messages + [message] -%}\n"
    "{%- else -%}\n"
    "{%- set told = namespace(pictures=0, words='', whole='') -%}\n"
    "{%- for part in message.content -%}\n"
    "{%- if part.type == 'text' -%}\n"
    "{%- set told.words = told.words + part.text -%}\n"
    "{%- set told.whole = told.whole + part.text -%}\n"
    "{%- else -%}\n"
    "{%- set told.pictures = told.pictures + 1 -%}\n"
    f"{{%- set told.whole = told.whole + '{IMAGE_TOKEN}' -%}}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if told.pictures == 1 -%}\n"
    f"{{%- set told.whole = ('{IMAGE_TOKEN}\\n' + told.words | trim) | trim -%}}\n"
    "{%- endif -%}\n"
    "{%- set content = {'role': message.role, 'content': told.whole} -%}\n"
    "{%- set talk.messages = talk.messages + [content] -%}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- set messages = talk.messages %}\n"
)


class Chat:
    """The tokenizer's own chat template, or the one given, as `template`, which takes parts.

    Where it does not mark what the assistant says ({% generation %}), that is found by comparing
    what it writes with and without an answer; UsageError where the comparison does not tell, but
    for a chat that `only_asks`.
    """

    def __init__(
        self, tokenizer: Any, template: str | None = None, *, only_asks: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        own = template or tokenizer.get_chat_template()
        marked = re.search(r"\{%-?\s*generation\b", own) is not None
        # Templates of models that only read take text, and some drop silently what is a list.
        # Who only asks gets what training gets, wherever there can be training.
        for suits in (self._tells, self._asks) if only_asks else (self._tells,):
            for self.template in (own, f"{PARTS}{own}"):
                for self._is_marked in (True, False) if marked else (False,):
                    if suits():
                        return
        raise UsageError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: its chat template does not write what it"
            f" is given, with {IMAGE_TOKEN} for a picture, or does not tell where an answer begins"
            " and ends; mark that in it with {% generation %}, or choose template v1"
        )

    def _tells(self) -> bool:
        try:
            # What follows an answer is more where the conversation ends in some templates.
            going_on = self._render(self._as_taken(PROBE)).partition("a0z.")[2]
            self._closing = self._render(self._as_taken(PROBE[:2])).partition("a0z.")[2]
            self._ending = self._in_common(self._closing, going_on)
            text, spans = self(PROBE)
            begins = [self.asked(PROBE[:end]) for end in range(1, len(PROBE), 2)]
        except (Unusable, jinja2.TemplateError, TypeError, ValueError):
            return False
        said = [text[begin:end] for begin, end in spans]
        asked = all(text.count(f"q{number}z?") == 1 for number in range(3))
        answered = len(said) == 3 and all(
            f"a{number}z." in one and one.rstrip()[-4:] != f"a{number}z."  # an end token follows
            for number, one in enumerate(said)
        )
        others = any(f"q{number}z?" in one for number in range(3) for one in said)
        prompted = begins == [text[:begin] for begin, _ in spans]
        return asked and answered and not others and prompted and text.count(IMAGE_TOKEN) == 1

    def _in_common(self, one: str, other: str) -> str:
        """The beginning that two texts share, in whole tokens where these are marks."""
        marks = sorted(self._tokenizer.get_added_vocab(), key=len, reverse=True)
        cut = re.compile(f"({'|'.join(map(re.escape, marks)) or '(?!)'})")
        pairs = zip(cut.split(one), cut.split(other), strict=False)
        return "".join(piece for piece, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _asks(self) -> bool:
        try:
            text = self.asked(PROBE[:-1])
        except (jinja2.TemplateError, TypeError, ValueError):
            return False
        said = [text.count(one) for one in ("q0z?", "a0z.", "q1z?", "a1z.", "q2z?", IMAGE_TOKEN)]
        return said == [1] * len(said)

    def asked(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the assistant's next answer begins."""
        return self._render(self._as_taken(messages), ask=True)

    def __call__(self, messages: Sequence[Message]) -> Written:
        """The conversation as the template writes it."""
        messages = self._as_taken(messages)
        if self._is_marked:
            return self._marked(messages)
        text, spans = self._render(messages), []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                spans.append(self._span(messages, number, text))
        return Written(text, spans)

    def _as_taken(self, messages: Sequence[Message]) -> list[Message]:
        # PARTS writes the same, in more time.
        write = as_text if PARTS in self.template else _tidy
        return [{**message, "content": write(message)} for message in messages]

    def _render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=ask,
            )
        )

    def _marked(self, messages: Sequence[Message]) -> Written:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            [list(messages)],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return Written(rendered[0], [(int(begin), int(end)) for begin, end in spans[0]])

    def _span(self, messages: Sequence[Message], number: int, text: str) -> tuple[int, int]:
        """From where answer `number` is asked for to behind its end token, in the whole `text`."""
        asked = self._render(messages[:number], ask=True)
        alone = self._render(messages[: number + 1])
        if alone.startswith(asked) and alone.endswith(self._closing):
            said = alone[len(asked) : len(alone) - len(self._closing)] + self._ending
            if text.startswith(asked + said):
                return len(asked), len(asked) + len(said.rstrip())
        raise Unusable("template", "the chat template does not tell where an answer ends")


def _tidy(message: Message) -> list[dict[str, Any]]:
    """The parts of a message; how a picture is set off from text is left to the template."""
    parts = list(message["content"])
    if all(part["type"] == "text" for part in parts):
        return parts
    tidy = [part | {"text": part["text"].strip()} if "text" in part else part for part in parts]
    return [part for part in tidy if part.get("text", True)]
