"""What the pre-training decoder paints and writes, left to itself, one row at a time.

Owns the loading of a whole pre-training model and its two ways of going on from what it sees: the
patches after a prefix, and the caption. Refuses a folder whose weights do not fit, to the tensor.

Letters in shapes: B samples, I patches, T words, V vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimv2_mllm.model import llms
from aimv2_mllm.model.decoder_weights import load_decoder, read_decoder
from aimv2_mllm.model.incremental import PatchByPatch, WordByWord
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining
from aimv2_mllm.model.weights import load_encoder
from aimv2_mllm.objective import patchify

HIDDEN_GREY = 214  # what a patch outside the prefix looks like
# Whose mean and deviation a painted patch gets back -> the same in words.
STATISTICS = {
    "true": "the true patch's, which the model does not know",
    "previous": "those of the last patch shown",
    "prefix": "their averages over the patches shown",
}


def load_pretrainer(folder: str | Path) -> tuple[AIMv2ForPreTraining, Any, Preprocessing]:
    """The pre-training model of a pretrain stage's result, its tokenizer, and how it takes pixels.

    On the CPU, for evaluation. Raises UsageError where the decoder is missing or does not fit.
    """
    folder = Path(folder)
    config, _ = read_decoder(folder)
    model = AIMv2ForPreTraining(load_encoder(folder), config)
    load_decoder(model, folder)
    return model.eval(), llms.load_tokenizer(str(folder), talks=False), Preprocessing.load(folder)


@torch.inference_mode()
def paint(
    model: AIMv2ForPreTraining,
    pixel_values: Tensor,
    prefix_length: int,
    statistics: str = "true",
) -> Tensor:
    """`pixel_values` (B, C, H, W) with every patch from number `prefix_length` on painted anew.

    One patch after the other in raster order, each fed back as input for the next. The model
    predicts standardised patches: the shapes are its own, and each patch's mean and deviation are
    put back from where `statistics`, a key of `STATISTICS`, says. Raises ValueError on a prefix out
    of 1..I-1.
    """
    size = model.encoder.config.patch_size
    truth = patchify(pixel_values, size)  # (B, I, 588)
    num_patches = truth.shape[1]
    if not 1 <= prefix_length < num_patches:
        raise ValueError(f"prefix_length must lie in 1..{num_patches - 1}, not {prefix_length}")
    means, deviations = _put_back(truth, prefix_length, statistics)
    height, width = pixel_values.shape[-2:]
    next_patch = PatchByPatch(model, (height // size, width // size))
    patches = [truth[:, :prefix_length]]
    for patch in range(prefix_length, num_patches):
        shape = next_patch(patches[-1])[:, None].to(truth.dtype)  # (B, 1, 588)
        here = slice(patch, patch + 1)
        patches.append(shape * deviations[:, here] + means[:, here])
    return unpatchify(torch.cat(patches, dim=1), pixel_values)


def _put_back(truth: Tensor, prefix_length: int, statistics: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch as `statistics` says, of patches (B, I, 588): 2 of
    (B, I, 1)."""
    if statistics not in STATISTICS:
        raise ValueError(f"statistics must be one of {', '.join(STATISTICS)}, not {statistics!r}")
    means = truth.mean(-1, keepdim=True)
    deviations = (truth.var(-1, keepdim=True) + 1e-6).sqrt()  # as the objective standardises
    if statistics == "true":
        return means, deviations
    first = 0 if statistics == "prefix" else prefix_length - 1
    shown = (part[:, first:prefix_length].mean(1, keepdim=True) for part in (means, deviations))
    mean, deviation = (part.expand_as(means) for part in shown)
    return mean, deviation


def unpatchify(patches: Tensor, like: Tensor) -> Tensor:
    """The picture (B, C, H, W) of `like`'s shape whose patches in raster order are `patches`.

    The inverse of `objective.patchify`.
    """
    batch, channels, height, width = like.shape
    size = int((patches.shape[-1] // channels) ** 0.5)
    grid = patches.reshape(batch, height // size, width // size, size, size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, height, width)


def only_prefix(pictures: np.ndarray, prefix_length: int, patch_size: int) -> np.ndarray:
    """The pictures (B, H, W, 3) with every patch from number `prefix_length` on in grey."""
    columns = pictures.shape[2] // patch_size
    shown = pictures.copy()
    for patch in range(prefix_length, columns * (pictures.shape[1] // patch_size)):
        top, left = (side * patch_size for side in divmod(patch, columns))
        shown[:, top : top + patch_size, left : left + patch_size] = HIDDEN_GREY
    return shown


@torch.inference_mode()
def write_caption(model: AIMv2ForPreTraining, pixel_values: Tensor, tokenizer: Any) -> list[str]:
    """The decoder's greedy captions of whole pictures (B, C, H, W), which are all prefix: as many
    tokens as it has positions for, at most."""
    saying = WordByWord(model, pixel_values)
    ended = torch.zeros(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
    written: list[Tensor] = []  # of (B,)
    for length in range(model.decoder_config.max_text_tokens):
        if length:
            saying.append(written[-1])
        chosen = saying.logits.argmax(-1).masked_fill(ended, tokenizer.eos_token_id)
        ended |= chosen == tokenizer.eos_token_id
        if ended.all():
            break
        written.append(chosen)
    rows = list(zip(*(words.tolist() for words in written), strict=True)) or [()] * len(ended)
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
