"""A model that talks: what it is asked, in tokens, and what it gets to see of pictures.

Refuses what `prompts` refuses, before the tower has looked at anything.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from aimv2_mllm.chat.prompts import Prompter, num_tokens, pixels_of
from aimv2_mllm.data.talks.conversations import Message

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class Chatbot:
    """A Llava with its processor, as `load_model` returns them; an LLM alone is one without eyes,
    whose `processor` has no more than the tokenizer."""

    model: Any
    processor: Any
    data: Mapping[str, Any] | None = None  # as the stage's record has it; None: not ours

    @property
    def limit(self) -> int:
        """The most tokens, pictures and answer included, that the model can hold."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", sys.maxsize))

    @cached_property
    def prompter(self) -> Prompter:
        """What makes its prompts."""
        return Prompter(self.processor, is_ours=self.data is not None)


class Picture(NamedTuple):
    """A picture of a conversation: what tells it from others, how many tokens it becomes, and how
    the tower gets it (None: the model has seen it)."""

    key: str
    num_tokens: int
    pixels: Any


class Prompt(NamedTuple):
    """What is asked of a model: the tokens, those of pictures too, the pictures, and how many
    tokens the answer may have."""

    ids: list[int]
    pictures: list[Picture]
    room: int


def prompt_of(
    bot: Chatbot,
    messages: Sequence[Message],
    images: Sequence["Image.Image"],
    max_new_tokens: int,
    seen: Mapping[str, "Tensor"],
) -> Prompt:
    """The conversation as `bot` is asked it; its pictures are prepared for the tower, but for those
    that were `seen`. Raises UsageError as `chat.answer` does."""
    pictures: dict[str, Picture] = {}
    keys = [_key(image) for image in images]
    for key, image in zip(keys, images, strict=True):
        if key in pictures:
            continue
        if key in seen:
            pictures[key] = Picture(key, len(seen[key]), None)
        else:
            pixels = pixels_of(bot.processor, [image], bot.data)
            pictures[key] = Picture(key, num_tokens(bot.processor, pixels), pixels)
    ids, room = bot.prompter(
        messages,
        [pictures[key].num_tokens for key in keys],
        limit=bot.limit,
        max_new_tokens=max_new_tokens,
    )
    return Prompt(ids, [pictures[key] for key in keys], room)


def look(
    bot: Chatbot, pictures: Sequence[Picture], seen: Mapping[str, "Tensor"]
) -> dict[str, "Tensor"]:
    """What the LLM gets to see of each of `pictures`, (M, E) by its key.

    The tower is run for those that were not `seen`, all of one size together.
    """
    import torch

    found = {picture.key: seen[picture.key] for picture in pictures if picture.key in seen}
    new = {picture.key: picture for picture in pictures if picture.key not in seen}
    groups: dict[Any, list[Picture]] = {}
    for picture in new.values():
        groups.setdefault(picture.pixels["pixel_values"].shape, []).append(picture)
    for group in groups.values():
        together = {
            name: torch.cat([picture.pixels[name] for picture in group]).to(bot.model.device)
            for name in group[0].pixels
        }
        together["pixel_values"] = together["pixel_values"].to(bot.model.dtype)
        with torch.inference_mode():
            features = bot.model.get_image_features(**together).pooler_output
        found |= {picture.key: row for picture, row in zip(group, features, strict=True)}
    return found


def _key(image: "Image.Image") -> str:
    """What two pictures have in common only if all of their pixels are the same."""
    return f"{image.mode}{image.size}{hashlib.sha256(image.tobytes()).hexdigest()}"
