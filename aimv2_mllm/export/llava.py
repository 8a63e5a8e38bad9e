"""A Llava as the folder that transformers' own `LlavaForConditionalGeneration` loads without us.

Refuses what that class does not compute: other connectors than the MLP of two layers, and towers
that it reads otherwise than they were trained.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aimv2_mllm.errors import UsageError
from aimv2_mllm.export.options import Options
from aimv2_mllm.export.source import ANY_LLAVA, ExportSource, talking
from aimv2_mllm.export.writing import copy_files, write_weights
from aimv2_mllm.folders import CONFIG_FILE
from aimv2_mllm.model.preprocessing import PROCESSOR_FILE
from aimv2_mllm.model.shards import read_tensors, write_json


def write_llava(name: str, folder: Path, options: Options) -> tuple[ExportSource, dict[str, Any]]:
    """Write the Llava of `name` to `folder`; where it came from, and what the sidecar says."""
    from aimv2_mllm.chat.chat import load_model
    from aimv2_mllm.export.answers import reference

    source = talking(name)
    demand_stock(source)
    write_weights(
        read_tensors(source.folder),
        folder,
        destination=options.destination,
        dtype=options.dtype,
        most=options.most_bytes,
    )
    copy_files(source.folder, folder)
    write_json(folder / CONFIG_FILE, in_dtype(source.config, options.dtype_name))
    bot = load_model(source.folder, device="cpu")
    options.narrate("asking the model, for the reference")
    told = reference(bot.model, bot.processor, dtype=options.dtype)
    return source, {
        "feature_norm": feature_norm(source.config),
        "vision_feature_layer": source.config.get("vision_feature_layer", -1),
        "prompt_as_trained": told["input_ids"] == as_trained(bot)[0].tolist(),
        "pictures_as_trained": write_processor(source, folder),
        "reference": told,
    }


def demand_stock(source: ExportSource) -> None:
    """UsageError, with the reason and what to do, for a Llava that transformers has not."""
    config = source.config
    if config["model_type"] != ANY_LLAVA:
        return
    chosen, tower = dict(config.get("connector") or {}), config.get("tower")
    norm, layer = config.get("vision_feature_norm"), config.get("vision_feature_layer", -1)
    vision = config.get("vision_config") or {}
    reasons = []
    if chosen.get("name") != "mlp" or chosen.get("depth", 2) != 2:
        words = ", ".join(f"{key} {value}" for key, value in chosen.items())
        reasons.append(f"its connector is {words}, and Llava has the mlp of two layers alone")
    if vision.get("is_native"):
        reasons.append("its tower takes pictures of any shape, and Llava squares alone")
    elif not reasons:
        reasons.append(
            f"its tower, {tower}, is read at layer {layer} {norm}-norm, and Llava reads no such"
        )
    raise UsageError(
        f"{source.folder}: transformers' Llava cannot express it: {'; '.join(reasons)}. Load it by "
        "aimv2_mllm.load_model, take its tower by --format encoder, or train with tower: an AIMv2 "
        "of fixed size, connector: mlp"
    )


def write_processor(source: ExportSource, folder: Path) -> bool | None:
    """Let the processor in `folder` make squares of pictures as the training did, by a rim where
    that had one; whether it does so then, None where no training of ours is known."""
    data = source.record.get("recipe", {}).get("data")
    if data is None:
        return None
    path = folder / PROCESSOR_FILE
    settings = json.loads(path.read_text(encoding="utf-8"))
    pictures = settings["image_processor"]
    is_whole = bool(pictures["size"] == pictures["crop_size"])  # squashed to the square
    is_middle = bool(pictures["size"] == {"shortest_edge": pictures["crop_size"]["height"]})
    if all(one["kind"] == "handwriting" for one in data["sources"]):
        return False  # another shape goes on in the colour of its own paper, see `prompts`
    if data["image_aspect"] == "crop":
        return is_middle
    if is_middle or is_whole:
        pictures |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        write_json(path, settings)
    return is_middle or is_whole


def feature_norm(config: Mapping[str, Any]) -> str:
    """Whether a stock Llava's connector gets features after the tower's last norm or before it."""
    vision, layer = config.get("vision_config") or {}, config.get("vision_feature_layer", -1)
    depth = vision.get("num_hidden_layers")
    return "post" if vision.get("tie_last_hidden_states") and layer in (-1, depth) else "pre"


def in_dtype(config: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """`config` with the name of the dtype in which its weights are written, where it is another."""
    if name is None:
        return dict(config)
    parts = {key: value for key, value in config.items() if isinstance(value, dict)}
    within = {k: {**v, "dtype": name} for k, v in parts.items() if k.endswith("_config")}
    return {**config, **within, "dtype": name}


def as_trained(bot: Any) -> Any:
    """The reference question in the tokens of the training, (1, L)."""
    import torch

    from aimv2_mllm.chat.chatbot import prompt_of
    from aimv2_mllm.data.talks.conversations import said
    from aimv2_mllm.export.answers import QUESTION, asked

    prompt = prompt_of(bot, [said("user", QUESTION, pictures=1)], [asked(bot.processor)[1]], 1, {})
    return torch.tensor([prompt.ids])
