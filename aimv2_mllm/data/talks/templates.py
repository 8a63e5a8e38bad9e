"""How a conversation is written, in tokens, and which of them are supervised: those of what the
assistant says, with its end token, and nothing else.

Owns the ways of `TEMPLATES`: the tokenizer's own chat template, and LLaVA's `v1` and `plain`, which
are token for token those of its `llava.train.train.preprocess`. Refuses a chat template that does
not tell where answers begin and end.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np

from aimv2_mllm.data.files import Unusable
from aimv2_mllm.data.talks.chat_template import PROBE, Chat, Written, as_text
from aimv2_mllm.data.talks.conversations import Message, num_pictures, turn
from aimv2_mllm.errors import UsageError
from aimv2_mllm.marks import IMAGE_TOKEN, UNSUPERVISED

# The conversation `vicuna_v1` of LLaVA, which its option `--version v1` means.
V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
V1_END = "</s>"
# The same for those who talk to the result.
V1_CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
    f"{V1_SYSTEM}"
    "{% endif %}{% for message in messages %}{% if message.role != 'system' %}"
    "{% set parts = message.content %}"
    "{% if parts is string %}{% set parts = [{'type': 'text', 'text': parts}] %}{% endif %}"
    "{% if message.role == 'user' %}{{ ' ' if loop.first or messages[loop.index0 - 1].role == "
    "'system' else '' }}USER: "
    "{% for part in parts %}{{ '<image>\\n' if part.type == 'image' else part.text }}{% endfor %} "
    "{% else %}ASSISTANT:{% generation %}"
    "{% for part in parts %} {{ part.text }}{% endfor %}</s>{% endgeneration %}"
    "{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class Encoded(NamedTuple):
    """One conversation in tokens: `labels` are `ids` or UNSUPERVISED, (L,)."""

    ids: np.ndarray
    labels: np.ndarray


def written_v1(messages: Sequence[Message]) -> Written:
    """Vicuna's way: SYSTEM USER: question ASSISTANT: answer</s>USER: …"""
    system = as_text(messages[0]) if messages[0]["role"] == "system" else V1_SYSTEM
    text, spans = f"{system} ", []
    for message in messages:
        if message["role"] == "user":
            text += f"USER: {as_text(message)} "
        elif message["role"] == "assistant":
            begin = len(text) + len("ASSISTANT:")
            text += f"ASSISTANT: {as_text(message)}{V1_END}"
            spans.append((begin, len(text)))
    return Written(text, spans)


def written_plain(messages: Sequence[Message]) -> Written:
    """A picture and what is said of it, ended by a new line: what was asked is left out."""
    pictures = [part["type"] for part in messages[0]["content"]].count("image")
    if [message["role"] for message in messages] != ["user", "assistant"] or pictures != 1:
        raise Unusable("not_plain", "template plain is for one question about one picture")
    text = f"{IMAGE_TOKEN}{as_text(messages[1])}\n"
    return Written(text, [(len(IMAGE_TOKEN), len(text))])


def asked_v1(messages: Sequence[Message]) -> str:
    """The same up to where the next answer begins."""
    return f"{written_v1(messages).text}ASSISTANT:"


WrittenBy = Callable[[Sequence[Message]], Written]
# name -> what makes the writer for a tokenizer, and whether text is cut into tokens as LLaVA does
TEMPLATES: dict[str, tuple[Callable[[Any], WrittenBy], bool]] = {
    "chat": (Chat, False),
    "v1": (lambda tokenizer: written_v1, True),
    "plain": (lambda tokenizer: written_plain, True),
}


class Writer:
    """Conversations in tokens by one of `TEMPLATES`; each picture is `num_image_tokens` tokens.

    Where the chat template is `V1_CHAT_TEMPLATE`, `chat` is `v1`. `end` is the token that ends an
    answer; None in `plain`, where that is a new line. UsageError where it is no special token.
    """

    def __init__(
        self, tokenizer: Any, template: str = "chat", *, num_image_tokens: int = 0
    ) -> None:
        _demand_fast(tokenizer)
        if template == "chat" and tokenizer.chat_template == V1_CHAT_TEMPLATE:
            template = "v1"
        build, self._in_pieces = TEMPLATES[template]
        self.tokenizer, self._write = tokenizer, build(tokenizer)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._num_image_tokens = num_image_tokens
        self._special = control_tokens(tokenizer, self._write(PROBE[:2]).text)
        self.end = None if template == "plain" else self._end(template)

    def fitted(
        self,
        messages: Sequence[Message],
        most: int,
        *,
        cut: bool = True,
        counts: Sequence[int] | None = None,
    ) -> tuple[Encoded, int]:
        """The conversation in at most `most` tokens, and how many of its last turns that cost.

        `Unusable` where not even one turn fits, or, without `cut`, not all of them.
        """
        encoded = self(messages, counts)
        if len(encoded.ids) <= most:
            return encoded, 0
        first = 1 if messages[0]["role"] == "system" else 0
        turns = (len(messages) - first) // 2

        def first_turns(count: int) -> Encoded:
            return self(messages[: first + 2 * count], counts)

        lengths = range(1, turns)
        kept = bisect_right(lengths, most, key=lambda n: len(first_turns(n).ids)) if cut else 0
        if not kept:
            said = f"has {len(encoded.ids):,} tokens, and max_tokens allows {most:,}"
            raise Unusable("too_long", said)
        return first_turns(kept), turns - kept

    def __call__(self, messages: Sequence[Message], counts: Sequence[int] | None = None) -> Encoded:
        """The conversation in tokens, its first pictures of `counts` where they differ; `Unusable`
        for one that cannot be written or teaches nothing."""
        self._check(messages)
        try:
            text, spans = self._write(messages)
        except Unusable:
            raise
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise Unusable("template", f"the chat template refuses it: {error}") from None
        # (L,), (L, 2)
        ids, places = _tokens(self.tokenizer, text, in_pieces=self._in_pieces)
        supervised = np.zeros(len(ids), dtype=bool)
        for begin, end in spans:
            supervised |= (places[:, 0] < end) & (places[:, 1] > begin)
        repeats = np.ones(len(ids), dtype=np.int64)
        shown = ids == self.image_token_id
        if shown.sum() != (pictures := num_pictures(messages)):
            said = f"{shown.sum()} of its {pictures} pictures are written by the chat template"
            raise Unusable("template", said)
        repeats[shown] = self._num_image_tokens if counts is None else counts[:pictures]
        labels = np.where(supervised, ids, UNSUPERVISED)
        encoded = Encoded(np.repeat(ids, repeats), np.repeat(labels, repeats))
        if not (encoded.labels[1:] != UNSUPERVISED).any():
            raise Unusable("nothing_supervised", "no token of it is supervised")
        return encoded

    def blank(self) -> Encoded:
        """A picture about which nothing is said, and so nothing supervised."""
        ids = np.full(self._num_image_tokens, self.image_token_id)
        return Encoded(ids, np.full(len(ids), UNSUPERVISED))

    def _end(self, template: str) -> int:
        labels = self(turn("q0z?", "a0z.")).labels
        end = int(labels[labels != UNSUPERVISED][-1])
        if end not in self.tokenizer.added_tokens_decoder:
            said = self.tokenizer.decode(labels[labels != UNSUPERVISED])
            raise UsageError(
                f"{self.tokenizer.name_or_path or 'the tokenizer'}: template {template} writes"
                f" {said!r}, and that end is no token of its tokenizer: no answer would end; give"
                " an LLM that was tuned to talk, and template chat"
            )
        return end

    def _check(self, messages: Sequence[Message]) -> None:
        # Letters that are a special token would become it: the end of an answer, or a picture.
        for message in messages:
            for part in message["content"]:
                if found := self._special.search(part.get("text", "")):
                    raise Unusable("special_token", f"{found[0]} stands in its text")


def control_tokens(tokenizer: Any, written: str) -> re.Pattern[str]:
    """Finds the tokens that text must not spell: special ones, and others that are added to the
    vocabulary and that the chat template writes, as in `written`."""
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or token.content in written}
    found = {token for token in (*tokens, *tokenizer.all_special_tokens) if token.strip()}
    return re.compile("|".join(map(re.escape, sorted(found, reverse=True))) or "(?!)")


class Asker:
    """What stands before an answer, in tokens: those that `Writer` of template `chat` puts there.

    It serves chat templates from which nothing can be learned too. `control_tokens` finds what a
    question must not spell.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._in_pieces = tokenizer, tokenizer.chat_template == V1_CHAT_TEMPLATE
        self._write = asked_v1 if self._in_pieces else Chat(tokenizer, only_asks=True).asked
        self.control_tokens = control_tokens(tokenizer, self._write(PROBE[:-1]))

    def __call__(
        self, messages: Sequence[Message], num_image_tokens: int | Sequence[int]
    ) -> np.ndarray:
        """Questions and answers up to where the next answer begins, (L,); `num_image_tokens` is
        that of each picture, or one for all. UsageError where the template leaves a picture out."""
        ids, _ = _tokens(self._tokenizer, self.text(messages), in_pieces=self._in_pieces)
        repeats = np.ones(len(ids), dtype=np.int64)
        places = np.flatnonzero(ids == self._tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        if len(places) != num_pictures(messages):
            raise UsageError(
                f"the chat template of this model writes {len(places)} of the "
                f"{num_pictures(messages)} pictures: show them where it has a place for them, such"
                " as with the first question"
            )
        repeats[places] = num_image_tokens
        return np.repeat(ids, repeats)

    def text(self, messages: Sequence[Message]) -> str:
        """The same as text, `<image>` for each picture."""
        return self._write(messages)


def _demand_fast(tokenizer: Any) -> None:
    """UsageError for a tokenizer that does not tell which characters a token is of."""
    if not tokenizer.is_fast:
        raise UsageError(
            f"{tokenizer.name_or_path}: its tokenizer does not tell which characters a token"
            " is of; give one that has a tokenizer.json"
        )


def _tokens(tokenizer: Any, text: str, *, in_pieces: bool) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of `text`, (L,), and from and to which character each is, (L, 2)."""
    _demand_fast(tokenizer)
    if not in_pieces:
        found = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return np.array(found.input_ids), np.array(found.offset_mapping).reshape(-1, 2)
    ids, places, offset = list[int](), list[tuple[int, int]](), 0
    for number, piece in enumerate(text.split(IMAGE_TOKEN)):
        found = tokenizer(piece, return_offsets_mapping=True, verbose=False)
        tokens, where = found.input_ids, found.offset_mapping
        if number:
            ids.append(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
            places.append((offset, offset + len(IMAGE_TOKEN)))
            offset += len(IMAGE_TOKEN)
            # Only the first piece keeps the token with which the tokenizer begins a text.
            again = 1 if tokens and tokens[0] == tokenizer.bos_token_id else 0
            tokens, where = tokens[again:], where[again:]
        ids += tokens
        places += [(begin + offset, end + offset) for begin, end in where]
        offset += len(piece)
    return np.array(ids), np.array(places).reshape(-1, 2)
