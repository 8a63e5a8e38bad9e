"""The losses of pre-training on sheets that were not trained on.

Letters in shapes: B samples, I patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from aimv2_mllm.data.handwriting import scenes
from aimv2_mllm.data.pairs.batches import encode_captions, picture_batch
from aimv2_mllm.model.preprocessing import Preprocessing
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining
from aimv2_mllm.objective import PreTrainingBatch, PreTrainingObjective, patchify, standardise

BATCH_SIZE = 128


@torch.inference_mode()
def held_out_losses(
    model: AIMv2ForPreTraining,
    tokenizer: Any,
    preprocessing: Preprocessing,
    sheets: Sequence[scenes.Scene],
    *,
    seed: int,
    whole: bool = False,
) -> dict[str, float]:
    """The losses of pre-training on sheets that were not trained on, their prefixes drawn once.

    `caption_loss` in nats per token; `pixel_loss`, squared error per standardised value; and
    `pixel_loss_flat`, the same for a model that paints every patch in one tone. With `whole` every
    patch sees every patch, as after pre-training, and only the captions are left to predict.
    """
    objective = PreTrainingObjective(model.encoder.config.patch_size, tokenizer.eos_token_id)
    batches = _batches(model, tokenizer, preprocessing, sheets, None if whole else seed)
    counts = [objective.targets(batch) for batch in batches]
    totals = {kind: sum(count[kind] for count in counts) for kind in counts[0]}
    caption = pixel = flat = 0.0
    for batch in tqdm(batches, unit="batch", disable=None):
        loss = objective(model, batch, totals)
        caption, pixel = caption + float(loss.text), pixel + float(loss.image)
        if whole:
            continue
        targets = standardise(patchify(batch["pixel_values"], objective.patch_size))  # (B, I, 588)
        hidden = torch.arange(targets.shape[1]) >= batch["prefix_length"][:, None]
        flat += float(targets[hidden].square().mean(-1).sum()) / totals["image"]
    if whole:
        return {"caption_loss": caption}
    return {"caption_loss": caption, "pixel_loss": pixel, "pixel_loss_flat": flat}


def _batches(
    model: AIMv2ForPreTraining,
    tokenizer: Any,
    preprocessing: Preprocessing,
    sheets: Sequence[scenes.Scene],
    seed: int | None,
) -> list[PreTrainingBatch]:
    num_patches = model.encoder.config.num_patches
    most = model.decoder_config.max_text_tokens
    prefixes = torch.full((len(sheets),), num_patches)
    if seed is not None:
        draws = [scenes.generator(seed, "prefix", index) for index in range(len(sheets))]
        prefixes = torch.tensor([int(draw.integers(1, num_patches)) for draw in draws])
    batches = []
    for first in range(0, len(sheets), BATCH_SIZE):
        part = slice(first, first + BATCH_SIZE)
        captions = [scenes.caption(sheet) for sheet in sheets[part]]
        ids, lengths = encode_captions(captions, tokenizer, most)
        batch = PreTrainingBatch(
            caption_ids=ids,
            caption_length=lengths,
            pixel_values=picture_batch(sheets[part], preprocessing),
            prefix_length=prefixes[part],
        )
        batches.append(batch)
    return batches
