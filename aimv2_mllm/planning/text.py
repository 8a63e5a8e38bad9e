"""A plan in words: a block for each stage, and the list of problems."""

import shutil
from dataclasses import replace

from aimv2_mllm.engine.accelerators import Accelerator
from aimv2_mllm.formats import GIB, part_row
from aimv2_mllm.planning.planned import Memory, Plan, StagePlan
from aimv2_mllm.planning.problems import Problem
from aimv2_mllm.recipe.schema import Recipe


def written(plan: Plan, device: Accelerator, num_devices: int, utilisation: float) -> str:
    """The plan's stages as text, without its problems."""
    head = (
        f"{num_devices} x {device.name}: {device.memory / GIB:.1f} GiB each; hours at"
        f" {utilisation:.0%} of {device.bf16 / 1e12:.3g} (bf16) or {device.fp32 / 1e12:.3g} (fp32)"
        " TFLOP/s"
    )
    blocks = ["\n".join(_stage(stage, device, num_devices, utilisation)) for stage in plan.stages]
    planned = [stage for stage in plan.stages if stage.memory is not None]
    hours = sum(stage.hours(device, num_devices, utilisation) for stage in planned)
    whole = "in all" if len(planned) == len(plan.stages) else "all that could be planned"
    return "\n\n".join([head, *blocks, f"{whole}: {_hours(hours)}"])


def limits(recipe: Recipe, plan: Plan, device: Accelerator, num_devices: int) -> list[Problem]:
    """What memory and disk are too small for."""
    found = []
    for stage in plan.stages:
        if stage.memory is not None and not _fits(stage.memory, device, num_devices):
            needed = _taken(stage.memory, device, num_devices) / GIB
            found.append(
                Problem(
                    f"stages.{stage.name}.train",
                    f"needs {needed:.1f} GiB where there are {device.memory / GIB:.1f}: try"
                    f" {_remedies(stage, device, num_devices)}",
                )
            )
    needed = _disk(plan)
    folder = recipe.output.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        found.append(
            Problem(
                "output",
                f"needs {needed / GIB:.1f} GiB for checkpoints and results, and {existing} has"
                f" {free / GIB:.1f} free: give output=FOLDER on another disk",
            )
        )
    return found


def _taken(memory: Memory, device: Accelerator, num_devices: int) -> int:
    """The bytes that are taken of one device; processes on a processor share its memory."""
    return memory.total * (num_devices if device.is_shared else 1)


def _fits(memory: Memory, device: Accelerator, num_devices: int) -> bool:
    return _taken(memory, device, num_devices) <= device.memory


def _remedies(stage: StagePlan, device: Accelerator, num_devices: int) -> str:
    """What makes a stage fit; a lower micro-batch alone does nothing about the rest."""
    assert stage.memory is not None
    rest = replace(stage.memory, activations=0, logits=0)
    unit = "tokens" if stage.train.micro_batch_tokens else "size"
    smaller = [f"a lower micro_batch_{unit}", "activation_checkpointing"]
    found = smaller if _fits(rest, device, num_devices) else ["a smaller model"]
    if device.is_shared:
        return " or ".join([*found, *["fewer processes"] * (num_devices > 1)])
    return f"{', '.join([*found, 'strategy fsdp2'])} or more devices"


def _disk(plan: Plan) -> int:
    """Bytes of all results and checkpoints; one more is there while it is written."""
    return sum(
        stage.checkpoint * (min(stage.train.keep_checkpoints, _saves(stage)) + 1) + stage.loaded
        for stage in plan.stages
    )


def _saves(stage: StagePlan) -> int:
    return -(-stage.train.steps // stage.train.checkpoint_every)


def _stage(
    stage: StagePlan, device: Accelerator, num_devices: int, utilisation: float
) -> list[str]:
    train = stage.train
    lines = [f"stage {stage.name} ({stage.kind})"]
    lines += [f"  {part_row(*row)}" for row in stage.table]
    number, tokens = stage.num_micro_batches, train.micro_batch_tokens
    at_once = f"{number} x {stage.micro_batch}"
    if tokens:
        at_once = f"{stage.micro_batch}, {f'about {number} x ' * bool(number)}{tokens:,} tokens"
    lines.append(
        f"  steps       {train.steps:,} of {train.batch_size:,} samples: {stage.samples:,} in all;"
        f" per device {at_once} a step"
    )
    for source in stage.sources:
        rows = "rows not known" if source.rows is None else f"{source.rows:,} rows"
        rows = "no end" if source.kind == "handwriting" else rows
        passes = "" if source.epochs is None else f", {source.epochs:.3g} epochs"
        lines.append(f"  source      {source.kind}: {rows}{passes}")
    if stage.memory is None:
        return [*lines, "  not planned, see the problems"]
    shapes = ", ".join(f"{k} {'x'.join(map(str, v))}" for k, v in stage.shapes.items())
    lines.append(f"  batch       {shapes}")
    memory, beside = stage.memory, stage.memory.beside
    fits = "fits" if _fits(memory, device, num_devices) else "DOES NOT FIT"
    where = "in a process" if device.is_shared else "on a device"
    lines.append(
        f"  memory      {_size(memory.total)} {where}, {fits}: weights"
        f" {_size(memory.weights)}, gradients {_size(memory.gradients)}, optimiser"
        f" {_size(memory.optimiser)}, activations {_size(memory.activations)} (logits"
        f" {_size(memory.logits)})"
    )
    if device.is_shared:
        lines.append(
            f"              and libraries {_size(beside.libraries)}, other batches"
            f" {_size(beside.batches)}, weights aside {_size(beside.aside)}, freed and kept"
            f" {_size(beside.unused)}"
        )
    strategy = "ddp" if train.strategy == "auto" else train.strategy
    how = [train.precision, strategy if num_devices > 1 else "one process"]
    how += ["activation checkpointing"] * train.activation_checkpointing
    lines.append(f"              {', '.join(how)}; a checkpoint {_size(stage.checkpoint)}")
    if num_devices > 1:
        loading = stage.num_loading
        whose = "the first process alone"
        if loading > 1:
            whose = f"each process, {_size(loading * stage.loaded)} for {loading}"
        of = f"{_size(stage.loaded)} of its machine's memory for"
        lines.append(f"              while it loads, {of} {whose}")
    step = stage.flops * train.batch_size
    lines.append(
        f"  FLOPs       {stage.flops:.3e} a sample, {step:.3e} a step,"
        f" {step * train.steps:.3e} in all: {_hours(stage.hours(device, num_devices, utilisation))}"
    )
    return lines + [f"  note        {note}" for note in stage.notes]


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.1f} s"
    return f"{hours * 60:.1f} minutes" if hours < 1 else f"{hours:,.1f} hours"
