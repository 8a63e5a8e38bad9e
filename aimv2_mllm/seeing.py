"""What the verbs `probe` and `dream` do: an encoder's features judged, its decoder's dreams shown.

Owns their words on the terminal and in the pictures; refuses to compute: see `evaluation`.
"""

import io
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from aimv2_mllm import picture_grids
from aimv2_mllm.data import scenes
from aimv2_mllm.data.labelled import Labelled, load_labelled
from aimv2_mllm.errors import UsageError
from aimv2_mllm.evaluation import dreams, zeroshot
from aimv2_mllm.evaluation.features import see
from aimv2_mllm.evaluation.painter import Painter
from aimv2_mllm.evaluation.probes import KINDS, probe
from aimv2_mllm.files import write, write_picture
from aimv2_mllm.folders import pretrained_folder
from aimv2_mllm.model.towers import Tower, load_tower

SHOWN = 8  # pictures in a picture of features
NOTE = (
    "The decoder predicts standardised patches, one after the other, each from its own. Put back "
    "as mean and variance: {}. The caption is of the whole picture."
)
COLOURS = "Features: their first three principal components as red, green and blue."
UNPAINTED = "(nothing: this decoder never learned to paint, it was trained with alpha 0)"


def probe_tower(args: Namespace) -> None:
    """Print what the probe `args.kind` (or `all`) tells of the tower `args.encoder` by the labelled
    pictures `args.data`; write what was asked for."""
    data = load_labelled(args.data, seed=args.seed, limit=args.limit)
    tower = load_tower(args.encoder, image_size=args.image_size).float()
    kinds = list(KINDS) if args.kind == "all" else [args.kind]
    results = probe(tower, data, kinds, seed=args.seed, k=args.k, epochs=args.epochs)
    if args.pca:
        write_picture(Path(args.pca), _features(tower, data, args.seed))
    _tell(results, args)


def probe_zero_shot(args: Namespace) -> None:
    """Print what the LiT model `args.encoder` tells of the pictures `args.data` by the names of
    their classes in the prompts `args.templates`; write what was asked for."""
    templates = zeroshot.read_templates(Path(args.templates))
    data = load_labelled(args.data, seed=args.seed, limit=args.limit)
    tower, encode = zeroshot.load_lit_tower(args.encoder)
    _tell(zeroshot.zero_shot(tower, encode, data, templates), args)


def _tell(results: dict[str, Any], args: Namespace) -> None:
    results = {"encoder": args.encoder, "source": args.data} | results
    print(as_table(results))
    if args.out:
        text = json.dumps(results, indent=2, allow_nan=False) + "\n"
        write(Path(args.out), lambda file: file.write_text(text, encoding="utf-8"))


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
        low, high = (100 * end for end in found["interval"])
        lines.append(f"{name:<34}{100 * found['accuracy']:>7.1f} %   {low:.1f} to {high:.1f} %")
    return "\n".join(lines)


def _named(kind: str, found: dict[str, Any]) -> str:
    protocol = found["protocol"]
    if kind == "knn":
        return f"{protocol['k']} nearest neighbours"
    if kind == "attentive":
        chosen = protocol["chosen"]
        return f"attentive (lr {chosen['lr']:g}, decay {chosen['weight_decay']:g})"
    return {"linear": "linear", "zeroshot": "zero-shot"}[kind]


def _features(tower: Tower, data: Labelled, seed: int) -> Image.Image:
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


def dream(args: Namespace, picture: Image.Image | None) -> None:
    """Print the caption of `picture`, or without one of the held-out sheet `args.seed`; write what
    the decoder makes of it after each of `args.prefix` patches, by default after half of them.

    A decoder that was trained without captions, or without pictures to predict, is not asked for
    them: that is said instead. Raises UsageError on a prefix out of range.
    """
    painter = Painter(pretrained_folder(Path(args.model)))
    preprocessing, num_patches = painter.preprocessing, painter.num_patches
    prefixes = args.prefix or [num_patches // 2]
    for prefix in prefixes:
        painter.check(prefix, args.statistics)
    if picture is None:
        scene = scenes.scene(args.seed, "heldout", 0)
        picture = Image.fromarray(scenes.render(scene, preprocessing.image_size))
    pixels = preprocessing.prepare([picture])
    [original] = preprocessing.restore(pixels)
    columns = [
        (
            f"prefix: {prefix} of {num_patches} patches",
            *painter.paint(pixels, prefix, args.statistics),
        )
        for prefix in (prefixes if painter.paints else ())
    ]
    [features] = see(painter.model.encoder, pixels)
    caption = painter.caption(pixels) or "(nothing)"
    note = NOTE.format(dreams.STATISTICS[args.statistics]) if painter.paints else UNPAINTED
    words = (f"Caption: {caption}", f"{note} {COLOURS}")
    png = picture_grids.dream_grid(original, features, columns, words=words)
    write_picture(Path(args.out), _opened(png))
    if args.sheet:
        print(f"sheet:   {scenes.caption(scene)} (--seed {args.seed})")
    print(f"caption: {caption}")
    if not painter.paints:
        print(f"painted: {UNPAINTED}")
    print(f"picture: {args.out}")
