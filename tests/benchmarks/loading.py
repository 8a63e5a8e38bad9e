"""Print the memory that each of several processes takes until a stage's model is sharded.

    python tests/benchmarks/loading.py                   # two processes on a CPU, an LLM of 1 GiB
    python tests/benchmarks/loading.py --ranks 4 --case lora

MiB beyond what a process has before anything is built, at most: as Linux has it (VmHWM), with its
share of what several map (Pss), what it alone has (private), of that what is in no file and so
cannot be given up (own); and afterwards (VmRSS).
"""

import argparse
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from llava_shaped import write_models, write_rows
from measure import of_this_process
from stage_memory import CASES

from aimv2_mllm import heap
from aimv2_mllm.data.pairs.batches import Share
from aimv2_mllm.engine.accelerators import accelerator
from aimv2_mllm.engine.distributed import Ranks, joined
from aimv2_mllm.engine.strategies import place
from aimv2_mllm.model import llms
from aimv2_mllm.place import Place
from aimv2_mllm.planning.plan import plan
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.runs.run import run_stage

LLM = (2048, 5632, 5, 16, 8, 8_000)  # as in `llava_shaped.LLMS`; each tensor of 8 MiB or more
MIB = 2**20


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--case", choices=tuple(CASES), default="llm")
    parser.add_argument("--tiny", action="store_true", help="an LLM of a few MiB")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def recipe_of(args: argparse.Namespace, folder: Path) -> Recipe:
    stage = {
        **CASES[args.case],
        "tower": str(folder / "tower"),
        "llm": str(folder / "llm"),
        "connector": "mlp",
        "data": {"sources": [{"kind": "llava", "file": str(folder / "rows.json")}]},
        "train": {"steps": 1, "batch_size": args.ranks, "lr": 1e-4, "strategy": "fsdp2"},
    }
    plain = {"name": "memory", "output": folder / "run", "stages": {"stage": stage}}
    return Recipe.model_validate(plain)


def now() -> dict[str, int]:
    """Bytes of this process: with its share of what several map, without, and in no file."""
    text = Path("/proc/self/smaps_rollup").read_text()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    own = 1024 * sizes["Anonymous"]
    return {"Pss": 1024 * sizes["Pss"], "private": 1024 * private, "own": own}


@contextmanager
def most() -> Iterator[dict[str, int]]:
    """While entered, collects the most of what `now` tells."""
    found, ended = now(), threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            for name, size in now().items():
                found[name] = max(found[name], size)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    yield found
    ended.set()
    looking.join()


class Sharded(Exception):
    """All that was to be measured is done."""


def child(args: argparse.Namespace, folder: Path) -> None:
    """One rank: what it took, in a file."""
    recipe = recipe_of(args, folder)
    plan(recipe, accelerator(None), 1)  # it imports what a stage of this kind does
    gc.collect()
    heap.give_back()

    def sharded(model: Any, *_: Any, config: Any, ranks: Ranks, **__: Any) -> None:
        placed = place(model.train(), config, ranks)
        gc.collect()
        heap.give_back()
        ranks.gather(sum(p.numel() for p in placed.module.parameters()))
        raise Sharded

    with joined() as ranks, patch("aimv2_mllm.runs.run.train", sharded):
        init = torch.zeros(1)
        torch.distributed.broadcast(init, 0)
        before, held = now(), of_this_process("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
        where = Place(recipe, folder / "run", Share(ranks.rank, ranks.size))
        with most() as found, suppress(Sharded):
            run_stage("stage", recipe.stages["stage"], where, lambda text: None, ranks)
        took = {name: (size - before[name]) / MIB for name, size in found.items()}
        took["VmHWM"] = 1024 * (of_this_process("VmHWM") - held)
        took["after"] = 1024 * (of_this_process("VmRSS") - held)
        (folder / f"took-{ranks.rank}.json").write_text(json.dumps(took))


def main() -> None:
    words = sys.argv[1:]
    args = parse(words)
    if args.child:
        child(args, Path(args.child))
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, 16)
        sizes = (64, 128, 2, 4, 2, 512) if args.tiny else LLM
        write_models(folder, "nano", 56, sizes)
        llm = llms.load_llm(str(folder / "llm"), torch.bfloat16)  # as those of the hub are stored
        llm.save_pretrained(folder / "llm")
        [stage] = plan(recipe_of(args, folder), accelerator(None), args.ranks).stages
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
        command = [*launch, str(args.ranks), __file__, *words, "--child", name]
        subprocess.run(command, check=True)
        print(f"{args.case}: the model as it is held while it loads, {stage.loaded / MIB:.0f} MiB")
        print("rank   VmHWM     Pss  private     own   after")
        for rank in range(args.ranks):
            took = json.loads((folder / f"took-{rank}.json").read_text())
            print(f"{rank:4}{took['VmHWM']:8.0f}{took['Pss']:8.0f}{took['private']:9.0f}"
                  f"{took['own']:8.0f}{took['after']:8.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
