"""A Llava as haotian-liu/LLaVA loads it with our towers in it: the LLM's weights and the projector
under LLaVA's names, in float16, as LLaVA loads whatever is written; and the tower in a folder of
its own, `vision_tower`, which config.json names relative to itself, so that the whole may be moved.

Refuses LLMs, connectors and chat templates that LLaVA has not, and names by which it would take the
folder for another kind of model.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimv2_mllm.data.talks.templates import V1_CHAT_TEMPLATE
from aimv2_mllm.errors import UsageError
from aimv2_mllm.export.encoder import write_tower
from aimv2_mllm.export.llava import as_trained, demand_stock, feature_norm
from aimv2_mllm.export.options import Options
from aimv2_mllm.export.source import ExportSource, talking
from aimv2_mllm.export.writing import copy_files, write_weights
from aimv2_mllm.folders import CONFIG_FILE
from aimv2_mllm.model.preprocessing import PREPROCESSOR_FILE
from aimv2_mllm.model.projectors import rename_projector
from aimv2_mllm.model.shards import read_tensors, write_json
from aimv2_mllm.model.weights import read_encoder, save_encoder

CLASSES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}
TOWER = "vision_tower"
LLM, PROJECTOR = "language_model.", "multi_modal_projector."
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENIZER_FILE = "tokenizer_config.json"


def write_original(
    name: str, folder: Path, options: Options
) -> tuple[ExportSource, dict[str, Any]]:
    """Write the Llava of `name` to `folder`; where it came from, and what the sidecar says."""
    from aimv2_mllm.chat.chat import load_model
    from aimv2_mllm.export.answers import reference

    source = talking(name)
    _demand_known(source, options.destination.name)
    bot = load_model(source.folder, device="cpu")
    _demand_template(source, bot.processor)
    write_weights(
        renamed(read_tensors(source.folder)),
        folder,
        destination=options.destination,
        dtype=torch.float16,
        most=options.most_bytes,
    )
    copy_files(source.folder, folder, lambda file: "processor" not in file)
    _write_tokenizer(folder)
    newer = _newer(source.config["text_config"]) + _write_merges(folder)
    write_json(folder / CONFIG_FILE, llava_config(source))
    apart = folder / "apart"
    write_tower(source, apart, torch.float16)
    save_encoder(read_encoder(apart)[0], folder / TOWER, layout="original")
    shutil.copyfile(apart / PREPROCESSOR_FILE, folder / TOWER / PREPROCESSOR_FILE)
    shutil.rmtree(apart)
    return source, {
        "dtype": "float16",
        "template": "v1" if bot.processor.chat_template == V1_CHAT_TEMPLATE else "plain",
        "feature_norm": feature_norm(source.config),
        "not_on_4_37": newer,
        "reference": reference(bot.model, bot.processor, dtype=torch.float16, ids=as_trained(bot)),
    }


def _demand_known(source: ExportSource, name: str) -> None:
    demand_stock(source)
    config = source.config
    kind = config["text_config"].get("model_type")
    if kind not in CLASSES:
        raise UsageError(
            f"{source.folder}: its LLM is a {kind}, and LLaVA has {' and '.join(CLASSES)} here:"
            " give --format llava"
        )
    if feature_norm(config) != "post" or config.get("vision_feature_layer", -1) != -1:
        raise UsageError(
            f"{source.folder}: its tower is not read after its last norm, as our tower in LLaVA"
            " is: give --format llava"
        )
    words = name.lower()
    wrong = [word for word in ("lora", "mpt") if word in words]
    wrong += ["mistral"] if ("mistral" in words) != (kind == "mistral") and kind == "llama" else []
    if "llava" not in words or wrong or (kind == "mistral" and "mistral" not in words):
        wanted = "llava and mistral" if kind == "mistral" else "llava"
        raise UsageError(
            f"{name}: LLaVA tells what a folder is by its name: let it have {wanted} in it, and no"
            f" {' or '.join(sorted({'lora', 'mpt', 'mistral'} - {kind}))}"
        )


def _demand_template(source: ExportSource, processor: Any) -> None:
    """LLaVA asks by `vicuna_v1`, or by nothing but the picture; UsageError for other templates."""
    trained = source.record.get("recipe", {}).get("data", {}).get("template")
    if processor.chat_template != V1_CHAT_TEMPLATE and trained != "plain":
        raise UsageError(
            f"{source.folder}: LLaVA has no such chat template, and would ask in another than was"
            " trained: train with data.template: v1, or give --format llava"
        )


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a stock Llava under LLaVA's names, the tower's left out; embeddings that are
    tied to the head stand there twice."""
    llm = {n.removeprefix(LLM): t for n, t in state.items() if n.startswith(LLM)}
    if HEAD not in llm:
        llm[HEAD] = llm[EMBEDDINGS].clone()
    projector = {n: t for n, t in state.items() if n.startswith(PROJECTOR)}
    return {**llm, **rename_projector(projector, "llava")}


def llava_config(source: ExportSource) -> dict[str, Any]:
    """LLaVA's config.json for a stock Llava."""
    text = dict(source.config["text_config"])
    kind = text.pop("model_type")
    rope = dict(text.get("rope_parameters") or {})
    aspect = source.record.get("recipe", {}).get("data", {}).get("image_aspect", "crop")
    return {
        **text,
        "architectures": [CLASSES[kind]],
        "model_type": f"llava_{kind}",
        "dtype": "float16",
        "torch_dtype": "float16",
        "tie_word_embeddings": False,  # the head is written out
        # As transformers 4 reads it, beside rope_parameters.
        "rope_theta": rope.get("rope_theta", text.get("rope_theta", 10000.0)),
        "pretraining_tp": text.get("pretraining_tp", 1),
        "use_mm_proj": True,
        "mm_vision_tower": f"aimv2:./{TOWER}",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": source.config["vision_config"]["hidden_size"],
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if aspect == "pad" else None,
        "tokenizer_padding_side": "right",
    }


def _newer(text: Mapping[str, Any]) -> list[str]:
    """What of the LLM LLaVA's own transformers, 4.37.2, does not know."""
    found = []
    usual = text["hidden_size"] // text["num_attention_heads"]
    if text.get("head_dim") not in (None, usual):
        found.append(f"head_dim {text['head_dim']}, where the width makes {usual}")
    rope = text.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        found.append(f"rope_type {rope['rope_type']}")
    return found


def _write_tokenizer(folder: Path) -> None:
    """Give the tokenizer's class the name that transformers 4 and 5 both know."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return
    raw = json.loads(path.read_text(encoding="utf-8"))
    if not (folder / "tokenizer.model").is_file():
        raw["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, raw)


def _write_merges(folder: Path) -> list[str]:
    """Write the merges of tokenizer.json as tokenizers before 0.20 reads them, and newer too: "a b"
    in place of ["a", "b"]. What of them LLaVA's own transformers, 4.37.2, cannot read."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    pairs = raw.get("model", {}).get("merges") or []
    if all(isinstance(pair, str) for pair in pairs):
        return []
    if any(" " in part for pair in pairs for part in pair):
        return ["merges of tokens with blanks in them, in tokenizer.json"]
    raw["model"]["merges"] = [" ".join(pair) for pair in pairs]
    write_json(path, raw)
    return []
