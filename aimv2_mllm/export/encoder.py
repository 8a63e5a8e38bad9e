"""The encoder of a result as a folder of its own: of a pretrain stage, or the tower of a Llava,
tuned or not. The files are `convert`'s.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aimv2_mllm.errors import UsageError
from aimv2_mllm.export.answers import digest, features, picture, some
from aimv2_mllm.export.convert import convert
from aimv2_mllm.export.options import Options
from aimv2_mllm.export.source import ANY_LLAVA, LLAVA, ExportSource, seeing
from aimv2_mllm.folders import CONFIG_FILE, STAGE_FILE
from aimv2_mllm.model.layouts import MODEL_TYPES
from aimv2_mllm.model.preprocessing import PROCESSOR_FILE, Preprocessing
from aimv2_mllm.model.shards import PRECISIONS, read_tensors, write_json, write_tensors
from aimv2_mllm.model.weights import read_encoder

_TOWER = re.compile(r"(?:model\.)?vision_tower\.(.+)")


def write_encoder(name: str, folder: Path, options: Options) -> tuple[ExportSource, dict[str, Any]]:
    """Write the encoder of `name` to `folder`; where it came from, and what the sidecar says."""
    source = seeing(name)
    apart = folder / "tower"
    within = source.folder
    if source.config.get("model_type") in (LLAVA, ANY_LLAVA):
        write_tower(source, apart)
        within = apart
    layout = options.layout or "original"
    made = folder / "made"
    dtype = next((name for name, one in PRECISIONS.items() if one == options.dtype), None)
    convert(str(within), made, layout=layout, dtype=dtype, narrate=options.narrate)
    told = {"layout": layout, "reference": reference(made)}
    for file in made.iterdir():
        if file.name != STAGE_FILE:  # its source is a folder that is gone
            file.rename(folder / file.name)
    for path in (made, apart):
        shutil.rmtree(path, ignore_errors=True)
    return source, told


def write_tower(source: ExportSource, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the AIMv2 tower of a Llava to `folder`, made anew, with transformers' names, config
    and preprocessing; UsageError for a tower of another family."""
    vision = dict(source.config["vision_config"])
    if vision.get("model_type") not in MODEL_TYPES:
        raise UsageError(
            f"{source.folder}: its tower is a {vision.get('model_type')}, and encoders are AIMv2's"
            " here: take it from where it came from"
        )
    folder.mkdir(parents=True)
    found = {n: t for n, t in read_tensors(source.folder).items() if _TOWER.fullmatch(n)}
    tower = {_TOWER.fullmatch(name)[1]: tensor for name, tensor in found.items()}  # type: ignore[index]
    write_tensors(tower, folder, dtype=dtype)
    write_json(folder / CONFIG_FILE, vision)
    preprocessing_of(source).save(folder)


def preprocessing_of(source: ExportSource) -> Preprocessing:
    """How a Llava's pictures are prepared, by its processor's file."""
    path = source.folder / PROCESSOR_FILE
    try:
        settings: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Preprocessing.read(settings["image_processor"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: is not a processor's configuration ({error!r})") from None


def reference(folder: Path) -> dict[str, Any]:
    """What the encoder in `folder` makes of the reference picture, in float32, by our own code."""
    encoder = read_encoder(folder)[0].float().eval()
    preprocessing = Preprocessing.load(folder)
    side = preprocessing.image_size
    image = picture(side if preprocessing.native else 3 * side // 2)
    pixels = preprocessing.prepare([image])
    seen = {"picture": {"side": image.width, "sha256": digest(image)}, "pixels": some(pixels)}
    return seen | features(encoder, pixels)
