"""What lmms-eval asks, as our models are asked it: conversations, pictures, settings of an answer.

Owns the shapes of its requests, and imports nothing of it. Refuses what is neither text nor a
picture, and beams.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aimv2_mllm.data.pictures.images import as_rgb, open_image, upright
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation.answerers import Conversation
from aimv2_mllm.marks import IMAGE_TOKEN
from aimv2_mllm.model.sampling import Sampling

# Of a task that sets no limit: what lmms-eval's own LLaVA takes.
MOST_NEW_TOKENS = 1024
KNOWN = {
    "until", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty",
    "num_beams",
}  # fmt: skip


class Settings(NamedTuple):
    """How an answer is made."""

    max_new_tokens: int
    sampling: Sampling

    @property
    def draws(self) -> bool:
        """Whether asking again may give another answer."""
        return self.sampling.temperature > 0


def settings_of(generation: Mapping[str, Any]) -> Settings:
    """What a task's `generation_kwargs` ask for; those that are not `KNOWN` change nothing here.

    Tokens are drawn where a temperature above 0 is given, or `do_sample` alone.
    """
    beams = generation.get("num_beams") or 1
    if beams != 1:
        raise UsageError(f"the task wants num_beams {beams}, and models here have one")
    draws, temperature = generation.get("do_sample"), generation.get("temperature")
    if temperature is None:
        temperature = 1.0 if draws else 0.0
    if draws is False:
        temperature = 0.0
    until = generation.get("until") or ()
    words: dict[str, Any] = {"stop": tuple(filter(None, [until] if type(until) is str else until))}
    if temperature:
        words |= {"temperature": float(temperature), "top_p": float(generation.get("top_p") or 1)}
        words["top_k"] = int(generation.get("top_k") or 0)
    penalty = float(generation.get("repetition_penalty") or 1)
    limit = int(generation.get("max_new_tokens") or MOST_NEW_TOKENS)
    return Settings(limit, Sampling(**words, repetition_penalty=penalty))


def talk_of_messages(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """The conversation in lmms-eval's messages, whose image parts hold their pictures as `url`."""
    talk, pictures = list[dict[str, Any]](), list[Any]()
    for message in messages:
        parts = list[dict[str, str]]()
        for part in message["content"]:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                parts.append({"type": "image"})
                pictures.append(_picture(part["url"]))
            else:
                raise UsageError(f"the task shows {part['type']}, and these models see pictures")
        talk.append({"role": message["role"], "content": parts})
    return talk, pictures


def talk_of_text(text: str, visuals: Sequence[Any]) -> Conversation:
    """One question about `visuals`, which stand where the text has marks for as many pictures, and
    before it otherwise."""
    pictures = [_picture(visual) for visual in visuals]
    pieces = text.split(IMAGE_TOKEN)
    if not pictures or len(pieces) != len(pictures) + 1:
        pieces = [*[""] * len(pictures), text]
    parts = list[dict[str, str]]()
    for number, piece in enumerate(pieces):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return [{"role": "user", "content": parts}], pictures


def _picture(visual: Any) -> Any:
    from PIL import Image

    if isinstance(visual, Image.Image):
        return as_rgb(upright(visual))
    if isinstance(visual, str):
        return open_image(visual)
    raise UsageError(f"the task shows a {type(visual).__name__}, and these models see pictures")
