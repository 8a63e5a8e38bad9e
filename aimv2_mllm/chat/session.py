"""A model that talks, and what it remembers of a conversation: each picture is looked at once, and
a new turn runs its new tokens alone.

Owns the key-value cache between turns. Refuses to answer from a cache that is not to the token
what the conversation says.
"""

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from aimv2_mllm.chat.chatbot import Chatbot, Prompt, look, prompt_of
from aimv2_mllm.data.talks.conversations import Message
from aimv2_mllm.errors import UsageError
from aimv2_mllm.model.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from aimv2_mllm.model.speech import Speech


@dataclass
class Counts:
    """What an answer took; whole once the answer has ended."""

    image_tokens: int
    prompt_tokens: int  # with those of the pictures
    cached_tokens: int = 0  # of the prompt, held from the turn before
    answer_tokens: int = 0
    first_token_seconds: float = 0.0  # from the question on
    later_seconds: float = 0.0  # for the tokens after the first, without who reads them

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first; 0 where there are none."""
        later = self.answer_tokens - 1
        return later / self.later_seconds if later > 0 and self.later_seconds else 0.0

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt_tokens:,} tokens ({self.image_tokens:,} image, "
            f"{self.cached_tokens:,} cached); answer {self.answer_tokens:,} tokens, the first "
            f"after {self.first_token_seconds:.2f} s, then {self.tokens_per_second:.1f} tokens/s"
        )


class Reply(Iterator[str]):
    """An answer in pieces, as they are made, without blanks around the whole. Closing it stops the
    model. `counts` are what it took, `tokens` its own but for the end token, both whole once it has
    ended."""

    def __init__(
        self, pieces: Generator[str, None, None], counts: Counts, tokens: list[int]
    ) -> None:
        self._pieces, self.counts, self.tokens = pieces, counts, tokens

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the answer where it is."""
        self._pieces.close()


class _Held(NamedTuple):
    cache: Any
    keys: list[int | str]  # of each token in it: its id, or the key of the picture it is of


class ChatSession:
    """One conversation with `bot`, whose earlier turns may change: what is still the same at its
    beginning is not computed again.

    Not for two answers at a time: the second begins from nothing.
    """

    def __init__(self, bot: Chatbot) -> None:
        self._bot = bot
        self._held: _Held | None = None
        self._seen: dict[str, Tensor] = {}  # picture -> (M, E), as the LLM takes it

    def forget(self) -> None:
        """Give the memory of the conversation back."""
        self._held, self._seen = None, {}

    def stream(
        self,
        messages: Sequence[Message],
        images: Sequence["Image.Image"],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        stop: threading.Event | None = None,
    ) -> Reply:
        """What the model says next in the conversation `messages`; see `chat.stream`."""
        from aimv2_mllm.model.speech import Speech

        begun = time.perf_counter()
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}, must be 1 or more")
        prompt = prompt_of(self._bot, messages, images, max_new_tokens, self._seen)
        counts = Counts(sum(picture.num_tokens for picture in prompt.pictures), len(prompt.ids))
        speech = Speech(self._bot.processor.tokenizer, sampling.stop)
        counts.first_token_seconds = time.perf_counter() - begun
        pieces = self._pieces(prompt, counts, speech, sampling, stop)
        return Reply(_stripped(pieces), counts, speech.tokens)

    def _pieces(
        self,
        prompt: Prompt,
        counts: Counts,
        speech: "Speech",
        sampling: Sampling,
        stop: threading.Event | None,
    ) -> Generator[str, None, None]:
        from aimv2_mllm.model.decoding import Chooser, Decoding, embedded, ends_of

        begun = time.perf_counter()
        model = self._bot.model
        self._seen = seen = look(self._bot, prompt.pictures, self._seen)
        keys = _keys(prompt, model.config.image_token_id)
        # Whoever comes while this answer is made finds nothing, and begins anew.
        cache, counts.cached_tokens = self._taken(keys)
        choose, ends = Chooser(sampling, model.device), ends_of(model)
        ask = Decoding(model, cache)
        ids, cached = prompt.ids, counts.cached_tokens
        skipped = ids[:cached].count(model.config.image_token_id)
        pictures = [seen[picture.key] for picture in prompt.pictures]
        try:
            scores = ask(embedded(model, _row(ids[cached:], model), pictures, skipped=skipped))
            while True:
                token = choose([*ids, *speech.tokens], scores[0])
                counts.answer_tokens += 1
                text = "" if token in ends else speech.push(token)
                spent, begun = time.perf_counter() - begun, 0.0
                if counts.answer_tokens == 1:
                    counts.first_token_seconds += spent
                else:
                    counts.later_seconds += spent
                if text:
                    yield text
                if token in ends or speech.ended or len(speech.tokens) == prompt.room:
                    break
                if stop is not None and stop.is_set():
                    break
                begun = time.perf_counter()
                scores = ask(embedded(model, _row([token], model), []))
            if text := speech.rest():
                yield text
        except GeneratorExit:
            raise
        except BaseException:  # layers of the cache may hold different numbers of tokens
            cache = None
            raise
        finally:
            if cache is not None:
                held = [*keys, *speech.tokens][: cache.get_seq_length()]
                self._held = _Held(cache, held)

    def _taken(self, keys: list[int | str]) -> tuple[Any, int]:
        """The cache of the turn before, cut back to the tokens with which `keys` begin too, and
        how many these are; a fresh one where there is none that can be cut."""
        from aimv2_mllm.model.decoding import cut_back, fresh_cache

        held, self._held = self._held, None
        if held is not None:
            pairs = zip(held.keys, keys[:-1], strict=False)  # the last one's scores are wanted
            same = next((i for i, (old, new) in enumerate(pairs) if old != new), None)
            length = min(len(held.keys), len(keys) - 1) if same is None else same
            if length and cut_back(held.cache, length):
                return held.cache, length
        return fresh_cache(self._bot.model), 0


def _keys(prompt: Prompt, mark: int) -> list[int | str]:
    """What tells each token from others at its place: image tokens are alike but for their
    picture."""
    pictures = iter([picture.key for picture in prompt.pictures for _ in range(picture.num_tokens)])
    return [next(pictures) if token == mark else token for token in prompt.ids]


def _row(ids: list[int], model: Any) -> "Tensor":
    import torch

    return torch.tensor(ids, device=model.device)[None]


def _stripped(pieces: Generator[str, None, None]) -> Generator[str, None, None]:
    """The pieces without the blanks at the very start and the very end of the whole."""
    held, begun = "", False
    try:
        for piece in pieces:
            text = held + piece if begun else piece.lstrip()
            body = text.rstrip()
            held = text[len(body) :]  # it belongs to the answer only if more follows
            if body:
                begun = True
                yield body
    finally:
        pieces.close()
