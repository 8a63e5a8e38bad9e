"""A conversation as the inputs of a Llava, as in its training: as much as the model can hold.

Owns which turns are left out of one that is too long. Refuses a question that does not fit alone,
and text that the model would read as its own marks.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aimv2_mllm.data.decode import cropped, padded, rim_of
from aimv2_mllm.data.images import square
from aimv2_mllm.data.templates import Asker
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
    data: Mapping[str, Any] | None = None,
) -> tuple[Any, int]:
    """What the model gets of the conversation, ids (1, L) and pixels, and the answer's room.

    `data` is what the record of the model's last stage says it was trained on, by which pictures
    and tokens are those of its training; None: it is not ours, and both are as its `processor` has
    them. Of at most `limit` tokens a quarter, or `max_new_tokens`, is kept for the answer. What
    does not fit beside it is left out, oldest turns first, and stderr says so. Raises UsageError
    when the last question alone does not fit, and for messages that are not a conversation.
    """
    _check(processor, messages, images)
    pixels = _pixels(processor, images, data)
    tokens = _tokens(processor, pixels, len(images), is_ours=data is not None)
    kept = turns = _turns(messages)
    wanted, ids = min(max_new_tokens, limit // 4), list[int]()
    for kept in _shortened(turns):
        ids = tokens(kept)
        if len(ids) + wanted <= limit:
            break
    if len(ids) >= limit:
        raise UsageError(
            f"the question has {len(ids)} tokens with its picture, and this model can hold "
            f"{limit} with the answer: ask in fewer words"
        )
    if kept is not turns:
        print(
            f"aimv2-mllm: the conversation is longer than the model's {limit} tokens: the oldest "
            f"{len(turns) - len(kept)} of its {len(turns)} turns are left out",
            file=sys.stderr,
        )
    pixels.update({"input_ids": [ids], "attention_mask": [[1] * len(ids)]})
    return pixels.convert_to_tensors("pt"), min(max_new_tokens, limit - len(ids))


def _tokens(
    processor: Any, pixels: Any, num_pictures: int, *, is_ours: bool
) -> Callable[[list[Turn]], list[int]]:
    """What makes of turns, that hold all pictures, the tokens up to where the answer begins."""
    counts = [
        processor.replace_image_token(pixels, image_idx=index).count(processor.image_token)
        for index in range(num_pictures)
    ]
    asker = Asker(processor.tokenizer)
    # Training adds no token to what the template writes; processors add the one that starts a text.
    start = [] if is_ours else processor.tokenizer("").input_ids[:1]

    def tokens(turns: list[Turn]) -> list[int]:
        ids = asker([message for turn in turns for message in turn], counts).tolist()
        return ids if ids[: len(start)] == start else [*start, *ids]

    return tokens


def _pixels(processor: Any, images: Sequence["Image.Image"], data: Mapping[str, Any] | None) -> Any:
    from transformers import BatchFeature

    prepare = processor.image_processor
    if not images:
        return BatchFeature({})
    # Who takes pictures in their own shape trains on them so.
    if data is None or "image_sizes" in prepare.model_input_names:
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
