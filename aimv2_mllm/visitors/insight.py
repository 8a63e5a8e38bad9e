"""What a model makes of a picture: as its tower gets it, its features, where it looked for an
answer, and how its pre-training decoder would go on.

Refuses a connector whose tokens lie nowhere in the picture, where a place is asked for.

Letters in shapes: N patches, M tokens of a picture, D and E widths, L layers, A heads, T tokens.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aimv2_mllm.chat.chatbot import Chatbot, look, prompt_of
from aimv2_mllm.chat.prompts import pixels_of
from aimv2_mllm.data.talks.conversations import Message
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation.features import as_colours, enlarged
from aimv2_mllm.evaluation.painter import Painter
from aimv2_mllm.model.decoding import embedded
from aimv2_mllm.model.families import grid_of
from aimv2_mllm.model.grids import Grid
from aimv2_mllm.model.mllm import connector_inputs

SIDE = 448  # pixels that a picture shown has at least
LINE = (128, 128, 128)  # of the grid
HEAT = np.array([255, 64, 32])  # where the answer looked most


class View(NamedTuple):
    """A picture as the tower gets it, (H, W, 3) uint8, its grid of patches, and their tokens
    (N, D) behind the tower."""

    pixels: np.ndarray
    grid: Grid
    tokens: Tensor


class Look(NamedTuple):
    """The tokens of an answer, as texts, and for each how much of its attention to the picture went
    to each patch, (T, rows, columns) with sums of 1."""

    texts: list[str]
    shares: np.ndarray


def view(bot: Chatbot, picture: Image.Image) -> View:
    """What the tower of `bot` gets to see of `picture`, and makes of it."""
    prepared = pixels_of(bot.processor, [picture], bot.data)
    with torch.inference_mode(), connector_inputs(bot.model.model) as caught:
        words = {name: value.to(bot.model.device) for name, value in prepared.items()}
        words["pixel_values"] = words["pixel_values"].to(bot.model.dtype)
        bot.model.get_image_features(**words)
    values = prepared["pixel_values"]  # (1, 3, H, W)
    if "image_sizes" in prepared:
        height, width = prepared["image_sizes"][0].tolist()
        values = values[:, :, :height, :width]
    prepare = bot.processor.image_processor
    mean, std = (np.array(value) for value in (prepare.image_mean, prepare.image_std))
    pixels = (values[0].float().numpy().transpose(1, 2, 0) * std + mean) * 255
    grid = grid_of(values.shape, bot.model.config.vision_config)
    [tokens] = caught[0].cpu()  # (N, D)
    return View((pixels + 0.5).clip(0, 255).astype(np.uint8), grid, tokens)


def gridded(seen: View) -> Image.Image:
    """The picture as the tower gets it, lines between its patches."""
    pixels, (tall, wide) = _cells(seen)
    pixels[tall::tall] = pixels[tall::tall] // 2 + np.array(LINE) // 2
    pixels[:, wide::wide] = pixels[:, wide::wide] // 2 + np.array(LINE) // 2
    return Image.fromarray(pixels)


def coloured(seen: View) -> Image.Image:
    """The first three principal components of its patches' features as red, green and blue."""
    [colours] = as_colours(seen.tokens[None].float(), seen.grid)
    return Image.fromarray(enlarged(colours[None], _times(max(seen.grid)))[0])


def heated(seen: View, shares: np.ndarray) -> Image.Image:
    """The picture in grey, red where `shares` (rows, columns) of attention are large: the darkest
    is the largest of them."""
    pixels, (tall, wide) = _cells(seen)
    rows, columns = seen.grid
    heat = shares / max(float(shares.max()), 1e-12)
    heat = heat.repeat(rows // heat.shape[0], 0).repeat(columns // heat.shape[1], 1)
    heat = heat.repeat(tall, 0).repeat(wide, 1)[..., None]  # (H, W, 1)
    grey = pixels[: heat.shape[0], : heat.shape[1]].mean(-1, keepdims=True) * 0.6 + 90
    return Image.fromarray((grey * (1 - heat) + HEAT * heat).clip(0, 255).astype(np.uint8))


def where(
    bot: Chatbot, messages: Sequence[Message], images: Sequence[Image.Image], ids: Sequence[int]
) -> Look:
    """Where in the last of `images` the model looked for each token of the answer `ids`, which it
    gave to `messages`.

    The attention of the place that made the token, over the image tokens, as the mean of all heads
    and layers. UsageError for a connector whose tokens lie nowhere, and for an empty answer.
    """
    if not ids or not images:
        raise UsageError("there is no answer about a picture yet: ask something first")
    grid = _token_grid(bot, view(bot, images[-1]))
    prompt = prompt_of(bot, messages, images, len(ids), {})
    features = [look(bot, [picture], {})[picture.key] for picture in prompt.pictures]
    asked, told = (torch.tensor([row], device=bot.model.device) for row in (prompt.ids, [*ids]))
    with torch.inference_mode():
        # Apart: an image token that the model writes itself is of no picture.
        parts = [embedded(bot.model, asked, features), embedded(bot.model, told, [])]
        made = _telling(bot.model)(
            inputs_embeds=torch.cat(parts, 1), output_attentions=True, use_cache=False
        )
    attention = torch.stack([layer[0].float().mean(0) for layer in made.attentions]).mean(0)
    start, count = len(prompt.ids), grid[0] * grid[1]
    places = (asked[0] == bot.model.config.image_token_id).nonzero()[-count:, 0]
    # The token at place t was made at place t - 1.
    shares = attention[start - 1 : start - 1 + len(ids)][:, places]  # (T, M)
    shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-12)
    texts = [bot.processor.tokenizer.decode([token]) for token in ids]
    return Look(texts, shares.reshape(-1, *grid).cpu().numpy())


def _token_grid(bot: Chatbot, seen: View) -> Grid:
    """Rows and columns of the image tokens of what was `seen`; their patches are squares."""
    projector = bot.model.model.multi_modal_projector
    out_grid = getattr(projector, "out_grid", None)
    grid: Grid | None = seen.grid if out_grid is None else out_grid(seen.grid)
    if grid is None or seen.grid[0] % grid[0] or seen.grid[1] % grid[1]:
        raise UsageError(
            f"the connector of this model ({type(projector).__name__}) makes tokens that lie "
            "nowhere in the picture, so nobody can say where it looked"
        )
    return grid


def _telling(model: Any) -> Any:
    """The LLM's body of `model` again, on the same weights, with the one attention that tells its
    shares; the model itself is left alone, for another thread may be answering with it."""
    language = model.model.language_model
    tensors = [*language.parameters(), *language.buffers()]
    plain = copy.deepcopy(language, {id(tensor): tensor for tensor in tensors})
    plain.set_attn_implementation("eager")
    return plain


def painted(
    painter: Painter, picture: Image.Image, prefix: int, statistics: str = "true"
) -> tuple[Image.Image, Image.Image, str]:
    """The picture with its first `prefix` patches alone, painted on from there, and the caption
    that is written of the whole; errors are those of `Painter.check`."""
    pixels = painter.preprocessing.prepare([picture])
    shown, made = painter.paint(pixels, prefix, statistics)
    times = _times(shown.shape[0])
    large = [Image.fromarray(enlarged(one[None], times)[0]) for one in (shown, made)]
    return large[0], large[1], painter.caption(pixels)


def _cells(seen: View) -> tuple[np.ndarray, tuple[int, int]]:
    """The picture enlarged, and height and width of one patch in it."""
    pixels = enlarged(seen.pixels[None], _times(max(seen.pixels.shape[:2])))[0].copy()
    rows, columns = seen.grid
    return pixels, (pixels.shape[0] // rows, pixels.shape[1] // columns)


def _times(side: int) -> int:
    """How often a picture of that side is enlarged."""
    return max(1, -(-SIDE // side))
