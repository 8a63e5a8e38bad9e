"""What a tower makes of labelled pictures, computed once: the examples that probes learn from.

Owns the pass over the pictures and the counting of those that cannot be decoded. Refuses a split of
which more than `MOST_SKIPPED` cannot be.

Letters in shapes: S pictures, N patches, D width, R the side of a thumbnail.
"""

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from aimv2_mllm.data.questions.labelled import LabelledPictures
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.evaluation.vision import Seeing

BATCH_SIZE = 128
MOST_SKIPPED = 0.05  # the largest share of a split that may be left out as undecodable
THUMBNAIL = 56  # side in pixels at which the raw-pixel control sees a picture, whatever the tower's
MOST_IN_MEMORY = 2 * 2**30  # bytes; patch tokens of more than this go to a file


@dataclass
class Examples:
    """What is known of one split's decodable pictures, in the source's order."""

    labels: Tensor  # (S,) int64
    features: Tensor  # (S, D) float32, the mean over a picture's patch tokens
    thumbnails: Tensor  # (S, R * R * 3) uint8
    tokens: Tensor | None = None  # (S, N, D) float16, for probes that pool by themselves
    skipped: list[str] = field(default_factory=list)  # why, of each picture left out


def look(
    tower: Seeing, pictures: LabelledPictures, name: str, *, keep_tokens: bool = False
) -> Examples:
    """`pictures`, in words `name`, as `tower` sees them.

    With `keep_tokens` the patch tokens are kept, in a file of the temporary folder where they are
    large. Raises UsageError where too many pictures cannot be decoded, RunFailed where features are
    no numbers.
    """
    count = len(pictures.labels)
    labels, features, thumbnails, skipped = list[int](), list[Tensor](), list[Tensor](), list[str]()
    store: Tensor | None = None
    side = tower.preprocessing.image_size
    for first in tqdm(range(0, count, BATCH_SIZE), desc=name, unit="batch", disable=None):
        decoded = []
        for index in range(first, min(first + BATCH_SIZE, count)):
            try:
                decoded.append((index, pictures.open(index, side)))
            except UsageError as error:
                skipped.append(str(error))
        if len(skipped) > MOST_SKIPPED * count:
            raise UsageError(
                f"{name}: {len(skipped):,} of {count:,} cannot be decoded, and "
                f"{MOST_SKIPPED:.0%} are the most; the first: {skipped[0]}"
            )
        if not decoded:
            continue
        pixels = tower.prepare([picture for _, picture in decoded])
        with torch.inference_mode():
            tokens = tower(pixels).float()  # (B, N, D)
        if not tokens.half().isfinite().all():
            raise RunFailed(f"{name}: the tower gives features that are not finite numbers")
        if keep_tokens:
            store = room(count, *tokens.shape[1:]) if store is None else store
            store[len(labels) : len(labels) + len(tokens)] = tokens.half()
        features.append(tokens.mean(1))
        thumbnails += [_thumbnail(picture) for _, picture in decoded]
        labels += [pictures.labels[index] for index, _ in decoded]
    store = None if store is None else store[: len(labels)]
    return Examples(
        torch.tensor(labels), torch.cat(features), torch.stack(thumbnails), store, skipped
    )


def centred(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both less the mean of the first: (S, D) each.

    Without it all cosines are near one: most of every picture may be the same paper.
    """
    mean = train.mean(0)
    return train - mean, test - mean


def _thumbnail(picture: Image.Image) -> Tensor:
    """Raw pixels (R * R * 3,) uint8, cropped to the middle."""
    small = ImageOps.fit(picture, (THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).flatten()


def room(count: int, num_patches: int, width: int) -> Tensor:
    """Room for patch tokens, (S, N, D) float16: in memory, or if that is much, mapped from a
    safetensors file, which goes when the process ends."""
    shape = (count, num_patches, width)
    num_bytes = 2 * count * num_patches * width
    if num_bytes <= MOST_IN_MEMORY:
        return torch.zeros(shape, dtype=torch.float16)
    about = {"dtype": "F16", "shape": shape, "data_offsets": [0, num_bytes]}
    header = json.dumps({"tokens": about}).encode()
    header += b" " * (-len(header) % 8)
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.flush()
        try:  # all of it now: a full disk would later be a signal, not an error
            os.posix_fallocate(file.fileno(), 0, 8 + len(header) + num_bytes)
        except OSError as error:
            raise UsageError(
                f"{file.name}: there is no room for {num_bytes / 2**30:.1f} GiB of patch tokens "
                f"({error.strerror}); set TMPDIR to a larger disk, or give --limit"
            ) from None
        mapped = np.memmap(Path(file.name), np.float16, "r+", offset=8 + len(header), shape=shape)
    return torch.from_numpy(mapped)  # the file has no name any more, and lives as long as this
