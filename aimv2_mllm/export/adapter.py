"""What a tune stage trained beside a base, in peft's own format: adapters on the LLM, and in the
same file the connector, and the tower where it was tuned, which peft puts in the base's place.

`PeftModel.from_pretrained(base, DST)` is then the tuned model; `base` is what the stage began with.
"""

import json
from collections.abc import Mapping
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from torch import Tensor

from aimv2_mllm.errors import UsageError
from aimv2_mllm.export.llava import demand_stock, write_processor
from aimv2_mllm.export.options import Options
from aimv2_mllm.export.source import ExportSource, talking
from aimv2_mllm.export.writing import copy_files, demand_room
from aimv2_mllm.folders import CONFIG_FILE, RECIPE_FILE, UNKNOWN, result_of, stage_record, stages_of
from aimv2_mllm.model.adapting import ADAPTER
from aimv2_mllm.model.hub import HUB_ID
from aimv2_mllm.model.shards import num_bytes, read_tensors, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOWER_FILE = "tower.safetensors"  # beside the adapters where the tower was tuned
# Before the names in peft's files: of a Llava's own parameters, and of its parts.
WRAPPER = "base_model.model."
PEFT = f"{WRAPPER}model."
MODULES = {"connector": "multi_modal_projector", "tower": "vision_tower"}


def write_adapter(name: str, folder: Path, options: Options) -> tuple[ExportSource, dict[str, Any]]:
    """Write the adapters of `name` to `folder`; where they came from, and what the sidecar says."""
    from safetensors.torch import save_file

    from aimv2_mllm.chat.chat import load_model
    from aimv2_mllm.export.answers import reference

    source = talking(name)
    demand_stock(source)
    config, adapters, trained = _read(source)
    parts = ["connector"] + ["tower"] * isfile(source.folder / ADAPTER / TOWER_FILE)
    modules = [MODULES[part] for part in parts]
    merged = read_tensors(source.folder)
    # The merged model has all of the parts, perhaps rounded; what was trained lies beside.
    whole = {
        f"{PEFT}{name}": tensor for name, tensor in merged.items() if name.split(".")[0] in modules
    }
    state = {**adapters, **whole, **trained}
    demand_room(options.destination, sum(num_bytes(tensor) for tensor in state.values()))
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    base = dict(source.record.get("base") or {})
    named = str(base.get("source") or base.get("stage") or base.get("llm") or UNKNOWN)
    config |= {"modules_to_save": modules, **_base_name(named, source)}
    write_json(folder / CONFIG, config)
    copy_files(source.folder, folder, lambda file: file != CONFIG_FILE)
    bot = load_model(source.folder, device="cpu")
    return source, {
        "base": base,
        "tower_tuned": "tower" in parts,
        "merged_in": str(bot.model.dtype).removeprefix("torch."),
        "pictures_as_trained": write_processor(source, folder),
        "reference": reference(bot.model, bot.processor),
    }


def _base_name(named: str, source: ExportSource) -> dict[str, str]:
    """The base as peft looks for it: a hub id with its commit where that is known, else the last
    piece of a path of this machine."""
    if isdir(named) or not HUB_ID.fullmatch(named):
        return {"base_model_name_or_path": Path(named).name}
    repository = named.partition("@")[0]
    commits = {one["source"]: one["revision"] for one in source.origins}
    commit = commits.get(repository, UNKNOWN)
    known = {} if commit == UNKNOWN else {"revision": commit}
    return {"base_model_name_or_path": repository, **known}


def _read(source: ExportSource) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The adapters' configuration and tensors, as peft wrote them, and what else was trained, under
    peft's names; UsageError where there are none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = source.folder / ADAPTER
    if not isdir(folder):
        kind = source.record.get("kind")
        trains = source.record.get("recipe", {}).get("trains")
        how = (
            f"in an {kind} stage" if kind == "align" else f"with trains: {trains}" if trains else ""
        )
        raise UsageError(
            f"{source.folder}: has no adapters, for none were trained{f' {how}' if how else ''}:"
            " give a tune stage with trains: lora, or --format llava"
        )
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        beside = [folder / f"{part}.safetensors" for part in MODULES]
        trained = [load_file(path) for path in beside if path.is_file()]
        named = {f"{WRAPPER}{name}": t for part in trained for name, t in part.items()}
        return config, load_file(folder / WEIGHTS), named
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UsageError(f"{folder}: is not peft's adapter ({error})") from None


def base_of(told: Mapping[str, Any], run: str | None, made: Path) -> tuple[str, str]:
    """Where the base of an exported adapter lies, and what it is, in words; one that was assembled
    from tower and LLM is assembled again in the folder `made`.

    UsageError where it cannot be found: `run` must be the run folder if a stage of it was the base.
    """
    base, is_run = told["base"], run is not None and isfile(Path(run) / RECIPE_FILE)
    if "source" in base:
        return str(base["source"]), f"base: {base['source']}"
    if not is_run and "stage" in base:
        raise UsageError(
            f"its base is the stage {base['stage']} of its run: give the run folder behind DST"
        )
    if "stage" in base:
        found = result_of(str(run), str(base["stage"]))
        if stage_record(found).get("fingerprint") != base.get("fingerprint"):
            raise UsageError(f"{found}: is not the base that was tuned; give the run that it is of")
        return str(found), f"base: stage {base['stage']}"
    if not {"tower", "llm"} <= base.keys():
        raise UsageError("it does not say what its base is; export it again from its run")
    stages = stages_of(Path(str(run))) if is_run else {}
    tower, llm = (
        str(result_of(str(run), base[key]) if base[key] in stages else base[key])
        for key in ("tower", "llm")
    )
    assemble_base(tower, llm, made)
    return str(made), f"base: {base['tower']} and {base['llm']}, put together by aimv2_mllm"


def assemble_base(tower: str, llm: str, folder: Path) -> None:
    """Write the Llava of a tower and an LLM, its connector not trained, to `folder`."""
    from aimv2_mllm.data.talks.templates import V1_CHAT_TEMPLATE
    from aimv2_mllm.model import llms, mllm
    from aimv2_mllm.model.towers import load_tower

    tokenizer = llms.load_tokenizer(llm, chat_template=V1_CHAT_TEMPLATE)
    mllm.assemble(load_tower(tower), llms.load_llm(llm), tokenizer).save_pretrained(folder)
