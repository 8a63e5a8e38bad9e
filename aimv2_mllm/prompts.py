"""A conversation as the inputs of a Llava: as much of it as the model can hold.

Owns which turns are left out of one that is too long. Refuses a question that does not fit alone,
and text that the model would read as its own marks.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from aimv2_mllm.data.images import square
from aimv2_mllm.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

# role: "user" | "assistant"; content: list of {"type": "text", "text": …} | {"type": "image"}
Message = dict[str, Any]
Turn = list[Message]  # a question and what follows it


def fitting_inputs(
    processor: Any,
    messages: Sequence[Message],
    images: Sequence["Image.Image"],
    *,
    limit: int,
    max_new_tokens: int,
) -> tuple[Any, int]:
    """What `processor` makes of the conversation, ids (1, L) and pixels, and the answer's room.

    Of at most `limit` tokens a quarter, or `max_new_tokens`, is kept for the answer. What does not
    fit beside it is left out, oldest turns first, and stderr says so. Raises UsageError when the
    last question alone does not fit, and for messages that are not a conversation.
    """
    _check(processor, messages, images)
    # Who takes pictures in their own shape says how large each is.
    whole = "image_sizes" in processor.image_processor.model_input_names
    pictures = [image if whole else square(image) for image in images]
    kept = turns = _turns(messages)
    inputs = _encode(processor, _prompt(processor, turns), pictures)
    length = inputs["input_ids"].shape[1]
    # A picture's mark becomes as many tokens as it has patches: the same surplus in every prompt.
    surplus = length - _num_tokens(processor, _prompt(processor, turns))
    wanted = min(max_new_tokens, limit // 4)
    for kept in _shortened(turns):
        length = _num_tokens(processor, _prompt(processor, kept)) + surplus
        if length + wanted <= limit:
            break
    if length >= limit:
        raise UsageError(
            f"the question has {length} tokens with its picture, and this model can hold "
            f"{limit} with the answer: ask in fewer words"
        )
    if kept is not turns:
        print(
            f"aimv2-mllm: the conversation is longer than the model's {limit} tokens: the oldest "
            f"{len(turns) - len(kept)} of its {len(turns)} turns are left out",
            file=sys.stderr,
        )
        inputs = _encode(processor, _prompt(processor, kept), pictures)
    return inputs, min(max_new_tokens, limit - length)


def _check(processor: Any, messages: Sequence[Message], images: Sequence["Image.Image"]) -> None:
    parts = [part for message in messages for part in message["content"]]
    marks = sum(part["type"] == "image" for part in parts)
    if marks != len(images):
        raise UsageError(f"the messages speak of {marks} pictures, and {len(images)} are given")
    if not messages or messages[-1]["role"] != "user":
        raise UsageError("the last message must be a question of the user")
    for part in parts:
        text = part.get("text", "")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError("the question is not valid UTF-8 text") from None
        for token in processor.tokenizer.all_special_tokens:
            # Read as a mark and not as text, it would end the turn or ask for another picture.
            if token in text:
                raise UsageError(f"the text {token!r} is a mark of this model: write it otherwise")


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


def _prompt(processor: Any, turns: list[Turn]) -> str:
    messages = [message for turn in turns for message in turn]
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _adds_start(processor: Any, prompt: str) -> bool:
    # Templates that write the start token themselves must not get a second one.
    start = processor.tokenizer.bos_token
    return start is None or not prompt.startswith(start)


def _num_tokens(processor: Any, prompt: str) -> int:
    tokenizer = processor.tokenizer
    return len(tokenizer(prompt, add_special_tokens=_adds_start(processor, prompt)).input_ids)


def _encode(processor: Any, prompt: str, pictures: list["Image.Image"]) -> Any:
    return processor(
        images=pictures or None,
        text=[prompt],
        add_special_tokens=_adds_start(processor, prompt),
        return_tensors="pt",
    )
