"""Print the memory that a plan foretells for stages that talk beside what their step takes.

    python tests/benchmarks/stage_memory.py                     # a CPU, base tower, 0.1b LLM, 6 GiB
    python tests/benchmarks/stage_memory.py --cases lora,nf4 --llm 0.5b --tower large

The plan is that of `run --dry-run`: its tensors, beside what torch allocates at most in the second
micro-batch of a step, as its profiler has it, with weights and optimiser; and the whole process,
beside the most that Linux says of one that trains three steps and saves (VmHWM). Each figure is of
a process of its own; the rows trained on are those of `llava_shaped`.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llava_shaped import LLMS, write_models, write_rows
from measure import CPU, in_a_child, most_allocated, peak_gib

from aimv2_mllm import heap
from aimv2_mllm.engine.accelerators import accelerator
from aimv2_mllm.engine.distributed import Ranks
from aimv2_mllm.engine.optimizer import build_optimizer
from aimv2_mllm.engine.strategies import keep_inputs
from aimv2_mllm.formats import GIB
from aimv2_mllm.model.quantising import num_bytes
from aimv2_mllm.place import Place
from aimv2_mllm.planning.plan import plan
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.runs.run import run
from aimv2_mllm.stages.table import STAGES

# name -> what the stage says besides its models, its samples and how it is optimised
CASES: dict[str, dict[str, Any]] = {
    "align": {"kind": "align"},
    "features": {"kind": "align"},
    "connector": {"kind": "tune", "trains": "connector"},
    "lora": {"kind": "tune"},
    "llm": {"kind": "tune", "trains": "llm"},
    "nf4": {"kind": "tune", "quantise": "nf4"},
    "int8": {"kind": "tune", "quantise": "int8"},
    "tower": {"kind": "tune", "tower_blocks": 4},
}


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tower", choices=("nano", "base", "large"), default="base")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--llm", choices=tuple(LLMS), default="0.1b")
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def recipe_of(
    args: argparse.Namespace, case: str, checkpointing: bool, folder: Path, steps: int = 1
) -> Recipe:
    """The recipe of one case."""
    data: dict[str, Any] = {"sources": [{"kind": "llava", "file": str(folder / "rows.json")}]}
    if case == "features":
        data["features"] = {"folder": str(folder / "features")}
    stage = {
        **CASES[case],
        "tower": str(folder / "tower"),
        "llm": str(folder / "llm"),
        "connector": "mlp",
        "data": data,
        "train": {
            "steps": steps,
            "batch_size": 2 * args.micro_batch,
            "micro_batch_size": args.micro_batch,
            "lr": 1e-4,
            "activation_checkpointing": checkpointing,
        },
    }
    plain = {"name": "memory", "output": folder / "run", "stages": {"stage": stage}}
    return Recipe.model_validate(plain)


def measured(args: argparse.Namespace, case: str, checkpointing: bool, folder: Path) -> Any:
    """GiB that torch allocates at most in a second micro-batch."""
    recipe = recipe_of(args, case, checkpointing, folder)
    stage = recipe.stages["stage"]
    heap.map_large()  # as a run does
    job = STAGES[stage.kind].build(stage, Place(recipe, recipe.output))
    if job.prepare is not None:
        job.prepare(job, Ranks(), lambda _: None)
    batches = job.batches(0)
    batch = max(batches, key=lambda one: sum(t.numel() for t in one.values()))
    model = job.model.train()
    if checkpointing:
        keep_inputs(model)
    optimizer = build_optimizer(job.parts, stage.train)
    totals = job.objective.targets(batch)
    job.objective(model, batch, totals).total.backward()
    optimizer.step()
    most = most_allocated(lambda: job.objective(model, batch, totals).total.backward())
    trained = sum(p.nbytes for named in job.parts.values() for _, p in named)
    kept = sum(map(num_bytes, model.parameters())) + 3 * trained
    kept += sum(t.nbytes for t in batch.values())
    return {"torch": (kept + most) / GIB}


def process(args: argparse.Namespace, case: str, checkpointing: bool, folder: Path) -> Any:
    """GiB of a process at most, in a run of three steps."""
    recipe = recipe_of(args, case, checkpointing, folder, steps=3)
    run(recipe, lambda line: None)
    shutil.rmtree(recipe.output)
    return {"process": peak_gib(CPU)}


def foretold(args: argparse.Namespace, case: str, checkpointing: bool, folder: Path) -> Any:
    """GiB of tensors and of the whole process, as a dry run has them."""
    planned = plan(recipe_of(args, case, checkpointing, folder), accelerator(None), 1)
    memory = planned.stages[0].memory
    assert memory is not None, [str(problem) for problem in planned.problems]
    return {"tensors": memory.tensors / GIB, "total": memory.total / GIB}


def main() -> None:
    words = sys.argv[1:]
    args = parse(words)
    if args.child:
        what, case, checkpointing, name = args.child
        measure = {"plan": foretold, "torch": measured, "process": process}[what]
        print(json.dumps(measure(args, case, checkpointing == "yes", Path(name))))
        return
    print(f"aimv2_{args.tower} at {args.image_size} px, LLM {args.llm}, {args.micro_batch} rows at "
          "once, fp32, cpu; GiB")  # fmt: skip
    print("case       checkpointing  tensors   torch   ratio   total  process   ratio")
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, 16)
        write_models(folder, args.tower, args.image_size, LLMS[args.llm])
        for case in args.cases.split(","):
            for word in ("no", "yes"):
                found = {}
                for what in ("plan", "torch", "process"):
                    child = ("--child", what, case, word, name)
                    found |= in_a_child("stage_memory.py", *words, *child)
                print(f"{case:10}{word:>14}{found['tensors']:9.3f}{found['torch']:8.3f}"
                      f"{found['tensors'] / found['torch']:8.3f}{found['total']:8.3f}"
                      f"{found['process']:9.3f}{found['total'] / found['process']:8.3f}",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
