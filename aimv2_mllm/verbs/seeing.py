"""What the verbs `probe` and `dream` show: an encoder's features judged, its decoder's dreams.

Owns their words on the terminal and in the pictures; refuses to compute: see `evaluation`.
"""

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from aimv2_mllm.data.questions.labelled import Labelled
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation import dreams
from aimv2_mllm.evaluation.features import see
from aimv2_mllm.evaluation.painter import Painter
from aimv2_mllm.formats import percent, percents
from aimv2_mllm.model.towers import Tower
from aimv2_mllm.reports import picture_grids

SHOWN = 8  # pictures in a picture of features
NOTE = (
    "The decoder predicts standardised patches, one after the other, each from its own. Put back "
    "as mean and variance: {}. The caption is of the whole picture."
)
COLOURS = "Features: their first three principal components as red, green and blue."
UNPAINTED = "(nothing: this decoder never learned to paint, it was trained with alpha 0)"


def as_table(results: dict[str, Any]) -> str:
    """The results of a probe for a terminal."""
    tower, data = results["tower"], results["data"]
    learned = f"{data['train']:,} to learn from, " if "train" in data else ""
    skipped = sum(data["skipped"].values())
    lines = [
        f"encoder  {results['encoder']} ({tower['model_type']}, {tower['image_size']} pixels, "
        f"sha256 {tower['sha256'][:12]})",
        *(f"         {note}" for note in tower["notes"]),
        f"data     {results['source']}: {len(data['classes']):,} classes, {learned}"
        f"{data['test']:,} to be tested on ({data['split']})"
        + (f"; {skipped:,} skipped as undecodable" if skipped else ""),
        "",
        f"{'probe':<34}{'right':>9}   95 % interval",
    ]
    rows = [(_named(kind, found), found) for kind, found in results["probes"].items()]
    controls = {
        "majority": "majority class, no picture",
        "pixels": "raw pixels, neighbours",
        "shuffled": "each class by another's prompts",
    }
    rows += [(controls[name], found) for name, found in results["controls"].items()]
    for name, found in rows:
        ends = percents(found["interval"])
        lines.append(f"{name:<34}{percent(found['accuracy']):>7} %   {ends} %")
    return "\n".join(lines)


def _named(kind: str, found: dict[str, Any]) -> str:
    protocol = found["protocol"]
    if kind == "knn":
        return f"{protocol['k']} nearest neighbours"
    if kind == "attentive":
        chosen = protocol["chosen"]
        return f"attentive (lr {chosen['lr']:g}, decay {chosen['weight_decay']:g})"
    return {"linear": "linear", "zeroshot": "zero-shot"}[kind]


def features_picture(tower: Tower, data: Labelled, seed: int) -> Image.Image:
    """The first test pictures, in an order that `seed` draws, above their features."""
    random = torch.Generator().manual_seed(seed)
    decoded: list[tuple[str, Image.Image]] = []
    for index in torch.randperm(len(data.test.labels), generator=random).tolist():
        try:
            picture = data.test.open(index, tower.preprocessing.image_size)
        except UsageError:
            continue  # counted by the probe
        decoded.append((data.classes[data.test.labels[index]], picture))
        if len(decoded) == SHOWN:
            break
    pixels = tower.prepare([picture for _, picture in decoded])
    shown = (tower.preprocessing.restore(pixels), see(tower, pixels))
    titles = [title for title, _ in decoded]
    png = picture_grids.feature_grid(list(zip(titles, *shown, strict=True)))
    return _opened(png)


def _opened(png: bytes) -> Image.Image:
    """The picture as RGB, which every format can hold."""
    return Image.open(io.BytesIO(png)).convert("RGB")


def dream(
    painter: Painter, picture: Image.Image, *, prefixes: Sequence[int] = (), statistics: str
) -> tuple[str, Image.Image]:
    """The caption of `picture`, and a picture of what the decoder makes of it after each of
    `prefixes` patches, by default after half of them.

    A decoder that was trained without captions, or without pictures to predict, is not asked for
    them: that is said instead. Errors are those of `Painter.check`.
    """
    num_patches = painter.num_patches
    prefixes = prefixes or [num_patches // 2]
    for prefix in prefixes:
        painter.check(prefix, statistics)
    pixels = painter.preprocessing.prepare([picture])
    [original] = painter.preprocessing.restore(pixels)
    columns = [
        (f"prefix: {prefix} of {num_patches} patches", *painter.paint(pixels, prefix, statistics))
        for prefix in (prefixes if painter.paints else ())
    ]
    [features] = see(painter.model.encoder, pixels)
    caption = painter.caption(pixels) or "(nothing)"
    note = NOTE.format(dreams.STATISTICS[statistics]) if painter.paints else UNPAINTED
    words = (f"Caption: {caption}", f"{note} {COLOURS}")
    return caption, _opened(picture_grids.dream_grid(original, features, columns, words=words))
