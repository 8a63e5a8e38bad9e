"""From the tokens of an answer to its text, piece by piece, each piece as soon as it is certain.

Refuses to give out half a character, or what may be the beginning of a text that ends the answer.
"""

from collections.abc import Sequence
from typing import Any


class Speech:
    """The text of one answer; `ended` once one of `stop_at` was said, which is not part of it."""

    def __init__(self, tokenizer: Any, stop_at: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop_at = tokenizer, stop_at
        self.tokens: list[int] = []
        self.ended = False
        # Tokens from `_begin` on are decoded, for some depend on those before; the text of those
        # from `_new` on is not out yet.
        self._begin = self._new = 0
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain now that `token` follows; often empty."""
        self.tokens.append(token)
        text = self._unsaid()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose last bytes are to come
            return ""
        self._begin, self._new = self._new, len(self.tokens)
        return self._checked(text)

    def rest(self) -> str:
        """What is left when no token follows."""
        said = "" if self.ended else self._checked(self._unsaid()) + self._held
        self._begin = self._new = len(self.tokens)
        self._held = ""
        return said

    def _unsaid(self) -> str:
        before, whole = (
            self._tokenizer.decode(tokens, skip_special_tokens=True)
            for tokens in (
                self.tokens[self._begin : self._new],
                self.tokens[self._begin :],
            )
        )
        return str(whole[len(before) :])

    def _checked(self, text: str) -> str:
        text = self._held + text
        places = [place for stop in self._stop_at if (place := text.find(stop)) >= 0]
        if places:
            self.ended, self._held = True, ""
            return text[: min(places)]
        unsure = max(
            (
                length
                for stop in self._stop_at
                for length in range(1, len(stop))
                if text.endswith(stop[:length])
            ),
            default=0,
        )
        self._held = text[len(text) - unsure :]
        return text[: len(text) - unsure]
