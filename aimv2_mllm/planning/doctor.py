"""What people lose days to, looked at in seconds before a run: `aimv2-mllm doctor`.

Towers are loaded with their weights, everything else is built with shapes alone; the samples are
the first ones of the run itself. What no earlier stage has made yet is stood in for, and said.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from aimv2_mllm.data.pairs.batches import CaptionBatches
from aimv2_mllm.data.talks.batches import TalkBatches
from aimv2_mllm.errors import RunFailed, UsageError
from aimv2_mllm.files import sha256
from aimv2_mllm.folders import TALKING, pretrained_folder
from aimv2_mllm.formats import part_row
from aimv2_mllm.model.hub import commit_of, locate
from aimv2_mllm.model.mllm import connector_inputs
from aimv2_mllm.model.shards import weight_files
from aimv2_mllm.model.towers import load_tower
from aimv2_mllm.model.weights import load_encoder
from aimv2_mllm.place import Place
from aimv2_mllm.planning.doctor_samples import Report, examine_captions, examine_talks
from aimv2_mllm.planning.problems import Problem, find_problems
from aimv2_mllm.planning.stand_ins import sketched
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.recipe.stages import Stage, references
from aimv2_mllm.stages.job import Job
from aimv2_mllm.towers.examined import versions
from aimv2_mllm.towers.tower import demand_finite

PACKAGES = ("torch", "transformers", "peft", "aimv2-mllm")


def examine(recipe: Recipe, say: Callable[[str], None]) -> list[Problem]:
    """Every problem of the recipe's stages that are not finished; what was found sound is said.

    Nothing is trained, and nothing written into the run folder.
    """
    report, place = Report(say), Place(recipe, recipe.output)
    report.tell("ok", f"versions: {versions(PACKAGES)}")
    report.problems += find_problems(place, 1)
    unbuilt = set[str]()
    with TemporaryDirectory() as folder:
        sketch = Place(recipe, Path(folder))
        for name, stage in recipe.stages.items():
            if place.result(name).is_dir():
                say(f"\nstage {name} ({stage.kind}): finished")
                sketch.result(name).parent.mkdir()
                sketch.result(name).symlink_to(place.result(name).absolute())
                continue
            say(f"\nstage {name} ({stage.kind})")
            _examine_weights(name, stage, place, report)
            waits_for = unbuilt & {*references(stage).values()}
            job = None if waits_for else _built(name, stage, sketch, report)
            if job is not None:
                _examine_job(name, stage, job, report)
                continue
            unbuilt.add(name)
            why = f"stage {waits_for.pop()}" if waits_for else "it"
            report.tell("note", f"left out: shapes and samples, for {why} cannot be built")
    return report.problems


def _examine_weights(name: str, stage: Stage, place: Place, report: Report) -> None:
    """That the stage's tower loads strictly, and that its weights are finite."""
    named = references(stage)
    for waiting in sorted({*named.values()} & place.recipe.stages.keys()):
        if not place.result(waiting).is_dir():
            report.tell(
                "note", f"stage {waiting} has no result yet: its shapes stand in, and whether its "
                "weights are finite is left out"
            )  # fmt: skip
    key = "start.encoder" if stage.kind == "pretrain" else "tower"
    value, here = named.get(key), f"stages.{name}.{key}"
    if value is None or report.knows(here):
        return
    if value in place.recipe.stages and not place.result(value).is_dir():
        return
    source = place.source(value)
    try:
        # As the stage itself does: what talks takes towers of any family.
        tower = load_tower(source) if stage.kind in TALKING else load_encoder(source)
        network: nn.Module = getattr(tower, "module", tower)
        demand_finite(network, source)
        told = _told(source)
    except (UsageError, RunFailed) as error:
        report.fault(here, str(error))
        return
    count = len(network.state_dict())
    report.tell("ok", f"tower: {count} tensors, finite, strictly loaded from {source} ({told})")
    for note in getattr(tower, "notes", ()):
        report.tell("note", f"tower: {note}")


def _told(source: str) -> str:
    """Which weights those of `source` are: their commit, or their sha256."""
    folder = locate(source)
    if commit := commit_of(source, folder):
        return f"commit {commit}"
    return f"sha256 {sha256(*weight_files(pretrained_folder(folder)))[:16]}"


def _built(name: str, stage: Stage, sketch: Place, report: Report) -> Job | None:
    """The stage with shapes alone; None where it cannot be built, which is then a problem."""
    wrong = {problem.key for problem in report.problems}
    micro = stage.train.micro_batch_size or stage.train.batch_size
    try:
        return sketched(name, stage, sketch, wrong=wrong, micro=micro)
    except (UsageError, RunFailed) as error:
        if not report.knows(f"stages.{name}"):
            report.fault(f"stages.{name}", str(error))
        return None


def _examine_job(name: str, stage: Stage, job: Job, report: Report) -> None:
    """The parts, the way of a picture, LoRA in the tower, and the first samples."""
    for row in job.table():
        report.tell("ok", f"part: {part_row(*row)}")
    examine_lora(name, job.model, report)
    here, batches = f"stages.{name}.data", job.batches
    num_sources = len(stage.data.sources)
    wrong = sum(report.knows(f"{here}.sources.{number}") for number in range(num_sources))
    if wrong:
        left = "samples" if wrong == num_sources else "samples of those"
        report.tell("note", f"{wrong} of {num_sources} sources cannot be opened; left out: {left}")
    if isinstance(batches, TalkBatches):
        num_image_tokens = _examine_connector(name, job.model, batches, report)
        if wrong < num_sources:
            examine_talks(here, job, batches, num_image_tokens, report)
    elif isinstance(batches, CaptionBatches) and wrong < num_sources:
        examine_captions(here, job, batches, report)


def examine_lora(name: str, model: nn.Module, report: Report) -> None:
    """That no LoRA module lies in the vision tower of `model`, the stage's."""
    modules = [n.split(".") for n, _ in model.named_modules() if n.endswith(".lora_A")]
    inside = [".".join(pieces) for pieces in modules if "vision_tower" in pieces]
    if inside:
        text = f"{len(inside)} LoRA modules lie in the vision tower, such as {inside[0]}"
        report.fault(f"stages.{name}.lora", text)
    elif modules:
        report.tell("ok", f"LoRA: {len(modules)} modules, none in the vision tower")


def _examine_connector(
    name: str, model: nn.Module, batches: TalkBatches, report: Report
) -> int | None:
    """The way of one picture through tower and connector; how many tokens it becomes, None for a
    model without eyes."""
    llava: Any = next((m for m in model.modules() if hasattr(m, "multi_modal_projector")), None)
    if llava is None or batches.preprocessing is None:
        return None
    connector = llava.multi_modal_projector
    side, config = batches.preprocessing.image_size, llava.config
    pixels = torch.empty(1, 3, side, side, device="meta")
    try:
        with torch.no_grad(), connector_inputs(llava) as given:
            [embedded] = llava.get_image_features(pixels).pooler_output  # (M, E)
    except (ValueError, RuntimeError) as error:
        report.fault(f"stages.{name}", f"a picture of {side} pixels does not pass: {error}")
        return None
    [(_, num_patches, width)] = [one.shape for one in given]  # (1, N, D)
    grid, (count, out) = side // config.vision_config.patch_size, embedded.shape
    report.tell("ok", f"image: {side} x {side} pixels, {grid} x {grid} patches, {width} wide, "
                f"become {count} tokens, {out} wide")  # fmt: skip
    kind = (getattr(config, "connector", None) or {"name": "mlp"})["name"]
    sizes = [tuple(tensor.shape) for tensor in connector.parameters()]
    report.tell("ok", f"connector: {kind}, {width} to {out} wide, shapes {sizes}")
    if num_patches != grid**2:
        text = f"the tower gives {num_patches} tokens where the picture has {grid**2} patches"
        report.fault(f"stages.{name}.tower", text)
    return int(count)
