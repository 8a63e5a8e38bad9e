"""Mistakes in LLaVA's flags and folders, found before anything heavy is loaded.

LLaVA finds them after minutes, or never: it decides by words in a folder's name, takes a projector
of another tower as far as shapes allow, and keeps an old tower under a new name.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from ..errors import UsageError, first_line, nearest
from ..folders import config_of
from .llava import meant_for_us
from .llava_connectors import build_projector
from .llava_images import join
from .sources import SOURCES
from .tower import VisionTower

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
           "pytorch_model.bin.index.json")  # fmt: skip


class Flags(NamedTuple):
    """LLaVA's three groups of training arguments."""

    model: Any
    data: Any
    training: Any


def read_flags(train: Any, words: Sequence[str]) -> Flags:
    """The flags of `llava.train.train`; UsageError for one that is unknown or not well-formed."""
    base: Any = importlib.import_module("transformers").HfArgumentParser

    class Parser(base):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise UsageError(message)

    parser = Parser((train.ModelArguments, train.DataArguments, train.TrainingArguments))
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(
            list(words), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, argparse.ArgumentError) as error:
        raise UsageError(first_line(error)) from None
    if unknown:
        known = [o for action in parser._actions for o in action.option_strings]
        raise UsageError(f"there is no flag {unknown[0]}{nearest(unknown[0], known)}")
    return Flags(*groups)


def check_flags(flags: Flags) -> None:
    """UsageError for what would fail late, or succeed with something else than was meant."""
    model, data, training = flags
    if not model.vision_tower:
        forms = " or ".join(f"{kind}:FOLDER_OR_HUB_ID" for kind in SOURCES)
        raise UsageError(f"there is no --vision_tower: give {forms}")
    is_ours = meant_for_us(model.vision_tower)
    _check_files(model, data)
    _check_stage(model, training)
    if is_ours:
        config = _llm_config(model.model_name_or_path)
        before = config.get("mm_vision_tower")
        if before not in (None, model.vision_tower):
            raise UsageError(
                f"--vision_tower is {model.vision_tower}, and {model.model_name_or_path} has "
                f"{before}, which LLaVA would keep: give that one, or an LLM without a tower"
            )
        _check_projector(model, config)


def _check_files(model: Any, data: Any) -> None:
    for flag, path in (("--data_path", data.data_path), ("--image_folder", data.image_folder)):
        if path is None and flag == "--image_folder":
            continue
        if path is None or not Path(path).exists():
            raise UsageError(f"{flag} is {path}, which is not there")
    adapter = model.pretrain_mm_mlp_adapter
    if adapter is not None and not Path(adapter).is_file():
        raise UsageError(
            f"--pretrain_mm_mlp_adapter is {adapter}, which is no file: give the mm_projector.bin "
            "of the projector stage"
        )


def _check_stage(model: Any, training: Any) -> None:
    folder, name = Path(training.output_dir), Path(training.output_dir).name.lower()
    if "llava" not in name or (training.lora_enable and "lora" not in name):
        wanted = "llava and lora" if training.lora_enable else "llava"
        raise UsageError(
            f"--output_dir ends in {folder.name}, and LLaVA loads by words in that name: "
            f"let it contain {wanted}"
        )
    if not training.unfreeze_mm_vision_tower:
        if training.mm_vision_tower_lr is not None:
            raise UsageError("--mm_vision_tower_lr needs --unfreeze_mm_vision_tower True")
    elif model.tune_mm_mlp_adapter:
        raise UsageError(
            "--tune_mm_mlp_adapter saves the projector alone, so a tower trained with it is lost: "
            "leave out --unfreeze_mm_vision_tower"
        )
    elif training.fsdp:
        raise UsageError(
            "under --fsdp LLaVA hides the tower from training: use deepspeed, "
            "or leave out --unfreeze_mm_vision_tower"
        )
    if model.tune_mm_mlp_adapter and any(folder.glob("checkpoint-*")):
        raise UsageError(
            f"{folder} holds checkpoints of a projector stage, which LLaVA cannot go on from: "
            "remove them, or give another --output_dir"
        )


def _check_projector(model: Any, config: dict[str, Any]) -> None:
    """That the tower is there, and the projector serves its grid and fits its file."""
    with torch.device("meta"):
        tower = VisionTower(model.vision_tower, layer=model.mm_vision_select_layer)
    width = config.get("hidden_size", config.get("d_model"))
    if width is None:
        return
    needed = argparse.Namespace(
        mm_projector_type=model.mm_projector_type,
        mm_patch_merge_type=model.mm_patch_merge_type,
        mm_hidden_size=tower.config.hidden_size,
        hidden_size=width,
    )
    with torch.device("meta"):
        stock: Any = importlib.import_module("llava.model.multimodal_projector.builder")
        projector = build_projector(needed) or stock.build_vision_projector(needed)
    join(tower, projector, needed)
    if model.pretrain_mm_mlp_adapter is not None:
        expected = {name: tuple(tensor.shape) for name, tensor in projector.state_dict().items()}
        _check_adapter(model, expected)


def _check_adapter(model: Any, expected: dict[str, tuple[int, ...]]) -> None:
    path = model.pretrain_mm_mlp_adapter
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {
            name.split("mm_projector.")[1]: tuple(tensor.shape)
            for name, tensor in state.items()
            if "mm_projector" in name
        }
    # What torch.load raises for a file that is none of its own differs with every release.
    except Exception as error:
        raise UsageError(f"{path} is no mm_projector.bin ({type(error).__name__})") from None
    if found != expected:
        wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
        name = wrong[0]
        raise UsageError(
            f"{path} is of another projector or tower: {name} is {found.get(name, 'missing')} in "
            f"it and {expected.get(name, 'not there')} in {model.mm_projector_type} between "
            f"{model.vision_tower} and the LLM"
        )


def check_model(path: str, base: str | None) -> None:
    """UsageError for a model's folder that LLaVA, which goes by its name, would take for another
    kind."""
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith("."):
            raise UsageError(f"{path} is not a folder")
        return  # a hub id
    names = [folder.name, folder.parent.name if folder.name.startswith("checkpoint-") else ""]
    name = " ".join(names).lower()
    if "llava" not in name:
        raise UsageError(
            f"{path}: LLaVA takes it for a plain LLM, for its name has no llava in it: rename it"
        )
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and "lora" not in name:
        raise UsageError(
            f"{path} holds LoRA, and LLaVA sees it by the word lora: rename the folder"
        )
    whole = any((folder / file).is_file() for file in WEIGHTS)
    if base is None and not whole:
        raise UsageError(
            f"{path} holds {'an adapter' if adapter else 'no LLM'}: give --model-base LLM too"
        )
    if base is not None and whole and not adapter:
        raise UsageError(f"{path} is a whole model: leave out --model-base")


def _llm_config(source: str) -> dict[str, Any]:
    """The config.json of a folder, or nothing of a hub id, which is not there yet."""
    folder = Path(source)
    return config_of(folder, "give the folder of an LLM") if folder.is_dir() else {}
