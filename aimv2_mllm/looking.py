"""Where an answer looked, and what there was to see: pictures of both.

Refuses to say where where nobody knows: a connector may leave no token a place.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from aimv2_mllm.chatbot import Chatbot
from aimv2_mllm.errors import UsageError
from aimv2_mllm.prompts import num_tokens, pixels_of
from aimv2_mllm.session import Record

LEAST_SIDE = 448  # pixels; smaller pictures are shown larger, so that a patch can be seen
LINE = (128, 128, 128)


class Seen(NamedTuple):
    """A picture as the tower gets it, its patches (rows, columns), and the places of the tokens
    that come of it; None: they have none."""

    picture: Image.Image
    patches: tuple[int, int]
    tokens: tuple[int, int] | None


def as_seen(bot: Chatbot, image: Image.Image) -> Seen:
    """`image` after the model's own preprocessing."""
    from aimv2_mllm.model.mllm import pictures_of

    processor = bot.processor
    pixels = pixels_of(processor, [image], bot.data)
    [shown] = pictures_of(processor)[0].restore(pixels["pixel_values"])  # (H, W, 3)
    patches = shown.shape[0] // processor.patch_size, shown.shape[1] // processor.patch_size
    places = getattr(processor, "token_grid", lambda grid: grid)(patches)
    count = num_tokens(processor, pixels)
    fits = places is not None and places[0] * places[1] == count
    return Seen(Image.fromarray(shown), patches, places if fits else None)


def with_grid(seen: Seen) -> Image.Image:
    """The picture with lines between its patches."""
    picture = _enlarged(seen.picture)
    draw = ImageDraw.Draw(picture)
    (rows, columns), (width, height) = seen.patches, picture.size
    for row in range(1, rows):
        draw.line((0, row * height // rows, width, row * height // rows), LINE)
    for column in range(1, columns):
        draw.line((column * width // columns, 0, column * width // columns, height), LINE)
    return picture


def words_of(bot: Chatbot, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to an answer; empty for what is only part of a character."""
    from aimv2_mllm.model.speech import Speech

    speech = Speech(bot.processor.tokenizer)
    words = [speech.push(token) for token in tokens]
    return [*words[:-1], words[-1] + speech.rest()] if words else []


def attention(bot: Chatbot, record: Record, index: int) -> list[np.ndarray]:
    """How much token `index` of the answer in `record` looked at each token of each picture.

    For each picture an (M,) of shares of all that was attended to, over text and pictures, when
    that token was chosen: the mean of all heads of all layers that attend. The answer is read again
    for it, the tower is not run. UsageError for a token that is not there, or without pictures.
    """
    import torch

    from aimv2_mllm.model.decoding import Decoding, embedded, fresh_cache

    if not 0 <= index < len(record.tokens):
        raise UsageError(
            f"the answer has {len(record.tokens)} tokens, 0 to {len(record.tokens) - 1}: there is "
            f"no token {index}"
        )
    if not record.pictures:
        raise UsageError("the conversation has no picture, so the answer looked nowhere")
    model, ids = bot.model, [*record.prompt.ids, *record.tokens[:index]]
    rows = torch.tensor(ids, device=model.device)[None]
    # What the answer says itself is text, even where it says the mark of a picture.
    tokens = embedded(model, rows[:, : len(record.prompt.ids)], record.pictures)
    tokens = torch.cat([tokens, embedded(model, rows[:, len(record.prompt.ids) :], [])], dim=1)
    cache = fresh_cache(model)
    with torch.inference_mode():
        if len(ids) > 1:
            Decoding(model, cache)(tokens[:, :-1])
        made = _attending_plainly(model)(
            inputs_embeds=tokens[:, -1:], past_key_values=cache, output_attentions=True
        )
        layers = [layer for layer in made.attentions if layer is not None]  # (1, H, 1, L) each
        shares = torch.stack([layer[0, :, -1].float().mean(0) for layer in layers]).mean(0)  # (L,)
    marks = rows[0, : len(record.prompt.ids)] == model.config.image_token_id
    seen = shares[: len(marks)][marks].cpu()
    counts = [len(picture) for picture in record.pictures]
    return [part.numpy() for part in torch.split(seen, counts)]


def _attending_plainly(model: Any) -> Any:
    """The LLM of `model` again, on the same weights, but so that its shares can be read.

    The model's own settings are left alone: another thread may be answering with it.
    """
    language = model.model.language_model
    weights = [*language.parameters(), *language.buffers()]
    plain = copy.deepcopy(language, {id(tensor): tensor for tensor in weights})
    plain.set_attn_implementation("eager")
    return plain


def heat_map(seen: Seen, shares: np.ndarray) -> Image.Image:
    """The picture in grey under colours from black over red and yellow to white, the lightest where
    the share is the largest. UsageError where the `shares` (M,) have no places."""
    if seen.tokens is None:
        raise UsageError(
            "the connector of this model mixes all patches into tokens without a place: nobody can "
            "say where in the picture they are"
        )
    assert shares.size == seen.tokens[0] * seen.tokens[1], (shares.shape, seen.tokens)
    picture = _enlarged(seen.picture)
    top = float(shares.max()) or 1.0
    heat = Image.fromarray(np.float32(shares.reshape(seen.tokens) / top))
    heat = heat.resize(picture.size, Image.Resampling.NEAREST)
    ramp = np.asarray(heat)[..., None] * 3 - np.array([0, 1, 2])  # (H, W, 3)
    colours = Image.fromarray(np.uint8(ramp.clip(0, 1) * 255))
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.6)


def _enlarged(picture: Image.Image) -> Image.Image:
    times = -(-LEAST_SIDE // max(picture.size))
    size = picture.width * times, picture.height * times
    return picture.resize(size, Image.Resampling.NEAREST)
