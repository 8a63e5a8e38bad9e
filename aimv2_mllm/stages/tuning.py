"""The stage that tunes a model that talks: from an earlier one, or assembled for it, by adapters on
its LLM or as it is, the LLM quantised or not, with the tower's last blocks or without."""

from typing import Any

from torch import nn

from aimv2_mllm.data.talks.templates import Writer
from aimv2_mllm.engine.optimizer import Parts
from aimv2_mllm.engine.precision import held_dtype
from aimv2_mllm.errors import UsageError, nearest
from aimv2_mllm.folders import talking_source
from aimv2_mllm.model import adapting, llms, mllm
from aimv2_mllm.model.quantising import quantise, require_bitsandbytes
from aimv2_mllm.model.shards import PRECISIONS
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.tune import LoraChoice, TuneStage
from aimv2_mllm.stages.job import Job
from aimv2_mllm.stages.llms import (
    assembled,
    check_aspect,
    check_connector,
    conversation_job,
    let_talk,
    load_talker,
    tower_sizes,
)


def build_tune(stage: TuneStage, place: Place) -> Job:
    """The Llava that the stage starts from, with what it adds; what it trains is in float32 and the
    rest frozen.

    The result has the adapters merged in: it is as stock a folder as the aligned one.
    """
    model, processor = _base(stage, place)
    result = _prepared(model, stage, place, form=stage.quantise)
    if stage.quantise is not None:

        def unquantised() -> adapting.Result:
            return _prepared(_base(stage, place)[0], stage, place, form=None)

        result.unquantised = unquantised
    parts = _parts(model, stage)
    job = conversation_job(model, parts, stage, place, processor, result)
    job.record = {
        "base": _base_record(stage, place),
        "trained": list(parts),
        "quantised": stage.quantise,
    }
    return job


def _base(stage: TuneStage, place: Place) -> tuple[Any, Any]:
    """The Llava that the stage starts from, weights as they are stored, and its processor."""
    if stage.start is None:
        return assembled(stage, place)
    model, processor = mllm.load_llava(talking_source(place.source(stage.start)), "auto")
    let_talk(model, processor, stage.data)
    return model, processor


def _prepared(model: Any, stage: TuneStage, place: Place, *, form: str | None) -> adapting.Result:
    """`model` with its LLM in `form`, its adapters, and its parameters frozen or not and held as
    they are trained."""
    begins = (adapting.CONNECTOR, *(adapting.LLM if stage.trains == "llm" else ()))
    trained = set(adapting.tower_names(model, stage.tower_blocks))
    trained |= {name for name, _ in model.named_parameters() if name.startswith(begins)}
    adapting.free(model, trained)
    adapting.hold(model, held_dtype(stage.train, place.has_bf16))
    adapters, llm = None, model.model.language_model
    if stage.trains == "lora":
        check_targets(stage.lora.targets, llms.linear_layers(llm))
    if form is not None:
        quantise(llm, form)
    if stage.trains == "lora":
        adapters = adapting.adapt(model, stage.lora.targets, _lora_words(stage.lora))
        # peft has frozen all but its own.
        adapting.free(model, trained)
    base = str(stage.start or stage.llm)
    return adapting.Result(model, PRECISIONS[stage.train.precision], adapters, base)


def _lora_words(lora: LoraChoice) -> dict[str, Any]:
    adapting.check_options(lora.options)
    return {
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        **lora.options,
    }


def _parts(model: nn.Module, stage: TuneStage) -> Parts:
    """What is trained of `model`, by the part it belongs to."""
    begins = {
        "llm": adapting.LLM,
        "connector": (adapting.CONNECTOR,),
        "tower": (adapting.TOWER,),
    }
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {
        part: [
            (name, p)
            for name, p in named
            if (adapting.ADDED in name if part == "lora" else name.startswith(begins[part]))
        ]
        for part in stage.parts_of(stage.model_dump())
    }


def _base_record(stage: TuneStage, place: Place) -> dict[str, Any]:
    """What the stage started from: an earlier stage with its fingerprint, or names from outside."""
    if stage.start is None:
        return {"tower": stage.tower, "llm": stage.llm}
    if stage.start not in place.recipe.stages:
        return {"source": stage.start}
    made = place.record(stage.start).get("fingerprint")
    return {"stage": stage.start, "fingerprint": made}


def check_tune(stage: TuneStage, place: Place) -> None:
    """UsageError for what the stage will not find or cannot do, as far as that shows before the
    stages that it starts from are trained."""
    if stage.quantise is not None:
        require_bitsandbytes(stage.quantise)
    adapting.check_options(stage.lora.options)
    root: Any = stage
    while isinstance(root, TuneStage) and root.start in place.recipe.stages:
        root = place.recipe.stages[root.start]
    source = getattr(root, "start", None)
    if source is not None:
        source = talking_source(source)
        config = mllm.llava_config(source)
        layers = llms.layers_of(config.text_config, source)
        depth = int(config.vision_config.num_hidden_layers)
    else:
        if root is stage:
            check_connector(stage, place)
        else:
            check_aspect(stage, str(root.tower), place)
        source = None if root.llm in place.recipe.stages else str(root.llm)
        layers = [] if source is None else llms.layer_names(source)
        depth = tower_sizes(root.tower, place)[2] if stage.tower_blocks else 0
    if stage.tower_blocks:
        adapting.check_depth(stage.tower_blocks, depth)
    if source is not None:
        if stage.trains == "lora":
            check_targets(stage.lora.targets, layers)
        Writer(load_talker(source, stage.data), stage.data.template)


def check_targets(targets: list[str], layers: list[str]) -> None:
    """UsageError for a name in `lora.targets` that none of the LLM's `layers` has."""
    unknown = [target for target in targets if target not in layers]
    if unknown:
        raise UsageError(
            f"lora.targets: the LLM has no {', '.join(unknown)}; its layers are "
            f"{', '.join(layers)}{nearest(unknown[0], layers)}"
        )
