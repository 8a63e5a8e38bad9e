"""An encoder from anywhere into a folder of one layout, whole or not at all, with its licence.

The licence and revision of the source go into `stage.json`, and from there into every later stage.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from aimv2_mllm.errors import UsageError
from aimv2_mllm.files import demand_free, new_folder, sha256
from aimv2_mllm.folders import CONFIG_FILE, STAGE_FILE, origin_of, origins_of
from aimv2_mllm.model.encoder import EncoderConfig
from aimv2_mllm.model.hub import commit_of, locate
from aimv2_mllm.model.layouts import read_config
from aimv2_mllm.model.preprocessing import PREPROCESSOR_FILE, Preprocessing
from aimv2_mllm.model.shards import PRECISIONS, weight_files, write_json
from aimv2_mllm.model.timm_layout import CLIP_MEAN, CLIP_STD, timm_config
from aimv2_mllm.model.weights import read_encoder, save_encoder


def convert(
    source: str,
    destination: Path,
    *,
    layout: str,
    image_size: int | None = None,
    dtype: str | None = None,
    narrate: Callable[[str], None],
) -> str:
    """Write the encoder of `source`, a folder or hub id, to the folder `destination` in `layout`;
    what was written and its licence, in two lines.

    `image_size` (pixels) resizes learned positions; `dtype`, of PRECISIONS, is the source's where
    it is not given. Raises UsageError, and leaves nothing behind, where it cannot be done.
    """
    destination = Path(os.path.abspath(destination))
    demand_free(destination)
    folder = locate(source)
    encoder, notes = read_encoder(folder, image_size)
    for note in notes:
        narrate(f"{source}: {note}")
    if dtype is not None:
        encoder = encoder.to(PRECISIONS[dtype])
    record = _record(source, folder)
    record["recipe"] = {"layout": layout, "image_size": image_size, "dtype": dtype}
    with new_folder(destination) as unfinished:
        save_encoder(encoder, unfinished, layout=layout)
        mean, std = _write_preprocessor(folder, unfinished, encoder.config)
        if layout == "timm":
            write_json(unfinished / CONFIG_FILE, timm_config(encoder.config, mean, std))
        for terms in sorted(folder.glob("LICENSE*")):
            shutil.copyfile(terms, unfinished / terms.name)
        record["files"] = {file.name: sha256(file) for file in sorted(unfinished.iterdir())}
        write_json(unfinished / STAGE_FILE, record)
    parameters = sum(p.numel() for p in encoder.parameters())
    kind = str(next(encoder.parameters()).dtype).removeprefix("torch.")
    return (
        f"wrote {destination}: AIMv2, {parameters:,} parameters in {kind}, {layout} layout, "
        f"{encoder.config.image_size} px\n"
        f"licence: {record['licence']} (of {record['source']}, revision {record['revision']})"
    )


def _record(source: str, folder: Path) -> dict[str, Any]:
    """What `stage.json` says of where the weights came from."""
    commit = commit_of(source, folder)
    read = [*weight_files(folder), folder / CONFIG_FILE, folder / PREPROCESSOR_FILE]
    return {
        "stage": "convert",
        "kind": "convert",
        **origin_of(folder, source, commit),
        "origins": origins_of(folder, source, commit),
        "source_files": {file.name: sha256(file) for file in read if file.is_file()},
        "versions": {name: version(name) for name in ("torch", "aimv2-mllm")},
    }


def _write_preprocessor(
    source: Path, target: Path, config: EncoderConfig
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Write the `preprocessor_config.json` of `source` for the encoder's size, or where there is
    none that of the released checkpoints; the mean and deviation that it has."""
    path, written, side = source / PREPROCESSOR_FILE, target / PREPROCESSOR_FILE, config.image_size
    if not path.is_file():
        replace(_published(source, side), native=config.native).save(target)
    try:
        raw = dict(json.loads((path if path.is_file() else written).read_text(encoding="utf-8")))
        mean, std = tuple(raw["image_mean"]), tuple(raw["image_std"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: is not an image processor's configuration ({error!r})") from None
    if not config.native:
        square, size = {"height": side, "width": side}, raw.get("size")
        shortest = not (isinstance(size, dict) and "height" in size)
        raw |= {"size": {"shortest_edge": side} if shortest else square, "crop_size": square}
    write_json(written, raw)
    return mean, std


def _published(source: Path, side: int) -> Preprocessing:
    """How the released checkpoints' processors prepare pictures: with the mean and deviation that
    timm's config in `source` has, or CLIP's."""
    timm = read_config(source).get("pretrained_cfg", {})
    return Preprocessing(side, tuple(timm.get("mean", CLIP_MEAN)), tuple(timm.get("std", CLIP_STD)))
