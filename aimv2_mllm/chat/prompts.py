"""A conversation as the prompt of a Llava, as in its training: as much as the model can hold.

Owns which turns are left out of one that is too long. Refuses a question that does not fit alone,
text that the model would read as its own marks, and a system prompt or a picture for which its
template has no place.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from aimv2_mllm.data.pictures.decode import cropped, padded, rim_of
from aimv2_mllm.data.pictures.images import square
from aimv2_mllm.data.talks.conversations import Message, said
from aimv2_mllm.data.talks.templates import Asker
from aimv2_mllm.errors import UsageError
from aimv2_mllm.narration import warn

if TYPE_CHECKING:
    from PIL import Image

Turn = list[Message]  # a question and what follows it


class Prompter:
    """What makes prompts for the model of one `processor`.

    `is_ours`: the model was trained here, and gets the tokens of its training; processors of others
    add the token that starts a text.
    """

    def __init__(self, processor: Any, *, is_ours: bool) -> None:
        tokenizer = processor.tokenizer
        self._asker = Asker(tokenizer)
        self._start = [] if is_ours else tokenizer("").input_ids[:1]
        self._has_system: bool | None = None
        self.num_short = 0  # prompts that left the answer less room than was wanted

    def __call__(
        self,
        messages: Sequence[Message],
        counts: Sequence[int],
        *,
        limit: int,
        max_new_tokens: int,
    ) -> tuple[list[int], int]:
        """The tokens up to where the answer begins, and how many the answer may have.

        `counts` are the tokens of each picture. Of at most `limit` tokens a quarter, or
        `max_new_tokens`, is kept for the answer. What does not fit beside it is left out, oldest
        turns first, and stderr says so. Raises UsageError when the last question alone does not
        fit, and for messages that are not a conversation.
        """
        self._check(messages, len(counts))
        system = [message for message in messages[:1] if message["role"] == "system"]
        kept = turns = _turns(messages[len(system) :])
        wanted, ids = min(max_new_tokens, limit // 4), list[int]()
        for kept in _shortened(turns):
            ids = self._tokens([*system, *(message for turn in kept for message in turn)], counts)
            if len(ids) + wanted <= limit:
                break
        if len(ids) >= limit:
            raise UsageError(
                f"the question has {len(ids)} tokens with its picture, and this model can hold "
                f"{limit} with the answer: ask in fewer words"
            )
        if kept is not turns:
            warn(
                f"the conversation is longer than the model's {limit} tokens: the oldest "
                f"{len(turns) - len(kept)} of its {len(turns)} turns are left out"
            )
        room = min(max_new_tokens, limit - len(ids))
        self.num_short += room < max_new_tokens
        return ids, room

    def _tokens(self, messages: Sequence[Message], counts: Sequence[int]) -> list[int]:
        ids: list[int] = self._asker(messages, counts).tolist()
        return ids if ids[: len(self._start)] == self._start else [*self._start, *ids]

    def _check(self, messages: Sequence[Message], num_pictures: int) -> None:
        parts = [part for message in messages for part in message["content"]]
        marks = sum(part["type"] == "image" for part in parts)
        if marks != num_pictures:
            raise UsageError(
                f"the messages speak of {marks} pictures, and {num_pictures} are given"
            )
        roles = [message["role"] for message in messages]
        if not roles or roles[-1] != "user":
            raise UsageError("the last message must be a question of the user")
        if "system" in roles[1:]:
            raise UsageError("a system prompt must be the first message")
        for part in parts:
            text = part.get("text", "")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise UsageError("the question is not valid UTF-8 text") from None
            # Read as a mark and not as text, it would end the turn or ask for a picture.
            if found := self._asker.control_tokens.search(text):
                raise UsageError(
                    f"{found[0]!r} is a special token of this model: rephrase the text"
                )
        if roles[0] == "system":
            self.demand_system()

    def demand_system(self) -> None:
        """UsageError where the template has no place for a system prompt."""
        if self._has_system is None:
            self._has_system = self._writes_system()
        if not self._has_system:
            raise UsageError(
                "the chat template of this model has no place for a system prompt: leave it out, "
                "or say it in the first question"
            )

    def _writes_system(self) -> bool:
        """Whether a system prompt is written, once, and otherwise than what others say."""
        words, asked = "s0z.", "q0z?"
        texts = {
            role: self._written(role, words, asked) for role in ("system", "user", "assistant")
        }
        text = texts.pop("system")
        is_whole = text.count(words) == 1 == text.count(asked) and "'text'" not in text
        return is_whole and text not in texts.values()

    def _written(self, role: str, words: str, asked: str) -> str:
        """What the template makes of `words`, and a question behind them; empty if it refuses."""
        try:
            return self._asker.text([said(role, words), said("user", asked)])
        except (jinja2.TemplateError, TypeError, ValueError):
            return ""


def num_tokens(processor: Any, pixels: Any) -> int:
    """How many tokens the one picture in `pixels` becomes."""
    marks: str = processor.replace_image_token(pixels, image_idx=0)
    return marks.count(processor.image_token)


def pixels_of(
    processor: Any, images: Sequence["Image.Image"], data: Mapping[str, Any] | None
) -> Any:
    """Pictures as the tower gets them.

    `data` is what the record of the model's last stage says it was trained on, by which they are
    those of its training; None: it is not ours, and they are as its `processor` has them.
    """
    prepare = processor.image_processor
    if data is None or data.get("image_aspect") == "native":
        return prepare(list(images), return_tensors="pt")
    size = int(prepare.crop_size["height"])
    if all(source["kind"] == "handwriting" for source in data.get("sources", ())):
        # Its sheets are all square; one of another shape goes on in the colour of its own paper.
        squares = [padded(square(image), size, (0, 0, 0)) for image in images]
    elif data["image_aspect"] == "crop":
        squares = [cropped(image, size) for image in images]
    else:
        squares = [padded(image, size, rim_of(prepare.image_mean)) for image in images]
    return prepare(squares, do_resize=False, do_center_crop=False, return_tensors="pt")


def _turns(messages: Sequence[Message]) -> list[Turn]:
    turns: list[Turn] = []
    for message in messages:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def _images(turns: list[Turn]) -> list[Message]:
    parts = [part for turn in turns for message in turn for part in message["content"]]
    return [part for part in parts if part["type"] == "image"]


def _shortened(turns: list[Turn]) -> Iterator[list[Turn]]:
    """The conversation, then ever less of it, oldest turns first; never without a picture.

    At the very end the last question stands alone and takes the pictures of all others along.
    """
    yield turns
    without = [index for index, turn in enumerate(turns[:-1]) if not _images([turn])]
    for count in range(1, len(without) + 1):
        yield [turn for index, turn in enumerate(turns) if index not in without[:count]]
    if _images(turns[:-1]):
        question = turns[-1][0]
        yield [[{**question, "content": [*_images(turns[:-1]), *question["content"]]}]]
