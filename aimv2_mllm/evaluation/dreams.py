"""What the pre-training decoder paints and writes, left to itself.

Owns the loading of a whole pre-training model and its two ways of going on from what it sees: the
patches after a prefix, and the caption. Refuses a folder whose weights do not fit, to the tensor.

Letters in shapes: B samples, I patches, T words, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimv2_mllm.model import mllm
from aimv2_mllm.model.decoder_weights import load_decoder, read_decoder
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining
from aimv2_mllm.model.weights import load_encoder
from aimv2_mllm.objective import patchify


def load_pretrainer(folder: str | Path) -> tuple[AIMv2ForPreTraining, Any, Preprocessing]:
    """The pre-training model of a pretrain stage's result, its tokenizer, and how it takes pixels.

    On the CPU, for evaluation. Raises UsageError where the decoder is missing or does not fit.
    """
    folder = Path(folder)
    config, _ = read_decoder(folder)
    model = AIMv2ForPreTraining(load_encoder(folder), config)
    load_decoder(model, folder)
    return model.eval(), mllm.load_tokenizer(str(folder)), Preprocessing.load(folder)


@torch.inference_mode()
def paint(model: AIMv2ForPreTraining, pixel_values: Tensor, prefix_length: int) -> Tensor:
    """`pixel_values` (B, C, H, W) with every patch from number `prefix_length` on painted anew.

    One patch after the other in raster order, each fed back as input for the next. The model
    predicts standardised patches; each gets the mean and deviation of the true patch put back, so
    the shape is the model's, the brightness and contrast of each patch are the original's. Raises
    ValueError on a prefix out of 1..I-1.
    """
    patch_size = model.encoder.config.patch_size
    truth = patchify(pixel_values, patch_size)  # (B, I, 588)
    num_patches = truth.shape[1]
    if not 1 <= prefix_length < num_patches:
        raise ValueError(f"prefix_length must lie in 1..{num_patches - 1}, not {prefix_length}")
    means = truth.mean(-1, keepdim=True)
    deviations = (truth.var(-1, keepdim=True) + 1e-6).sqrt()  # as the objective standardises
    canvas = truth.clone()
    # No patch is read before it is painted: after the prefix attention is causal.
    canvas[:, prefix_length:] = 0
    for patch in range(prefix_length, num_patches):
        predicted = _next_patches(model, unpatchify(canvas, pixel_values), prefix_length)
        # Patch j is predicted at position j - 1.
        shape = predicted[:, patch - 1].to(canvas.dtype)
        canvas[:, patch] = shape * deviations[:, patch] + means[:, patch]
    return unpatchify(canvas, pixel_values)


def unpatchify(patches: Tensor, like: Tensor) -> Tensor:
    """The picture (B, C, H, W) of `like`'s shape whose patches in raster order are `patches`.

    The inverse of `objective.patchify`.
    """
    batch, channels, height, width = like.shape
    size = int((patches.shape[-1] // channels) ** 0.5)
    grid = patches.reshape(batch, height // size, width // size, size, size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


@torch.inference_mode()
def write_caption(
    model: AIMv2ForPreTraining,
    pixel_values: Tensor,
    tokenizer: Any,
    max_tokens: int | None = None,
) -> list[str]:
    """The decoder's greedy captions of whole pictures (B, C, H, W), which are all prefix.

    At most `max_tokens` tokens each, by default as many as the decoder has positions for.
    """
    batch, device = pixel_values.shape[0], pixel_values.device
    prefix = torch.full((batch,), _num_patches(model, pixel_values), device=device)
    written = torch.zeros((batch, 0), dtype=torch.int64, device=device)  # (B, T)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    most = model.decoder_config.max_text_tokens
    for length in range(min(max_tokens or most, most)):
        lengths = torch.full((batch,), length, device=device)
        words = model(pixel_values, prefix, written, lengths).words  # (B, T + 1, V)
        chosen = words[:, -1].argmax(-1).masked_fill(ended, tokenizer.eos_token_id)
        ended |= chosen == tokenizer.eos_token_id
        if ended.all():
            break
        written = torch.cat([written, chosen[:, None]], dim=1)
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def _next_patches(model: AIMv2ForPreTraining, pixel_values: Tensor, prefix_length: int) -> Tensor:
    """The standardised patches (B, I, 588), row i predicting patch i + 1; no caption is given."""
    batch, device = pixel_values.shape[0], pixel_values.device
    no_words = torch.zeros((batch, 0), dtype=torch.int64, device=device)
    lengths = torch.full((batch,), prefix_length, device=device)
    patches: Tensor = model(pixel_values, lengths, no_words, torch.zeros_like(lengths)).patches
    return patches


def _num_patches(model: AIMv2ForPreTraining, pixel_values: Tensor) -> int:
    size = model.encoder.config.patch_size
    return (pixel_values.shape[-2] // size) * (pixel_values.shape[-1] // size)
