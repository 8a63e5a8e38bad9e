"""Measure tuning and alignment against transformers' Trainer on the same model, rows and steps.

    python tests/benchmarks/tuning.py          # LoRA: 16 minutes on 2 cores, 16 GiB
    python tests/benchmarks/tuning.py --mode align-second-epoch
    python tests/benchmarks/tuning.py --quick  # smaller models, 16 rows: under 2 minutes
    python tests/benchmarks/tuning.py --device cuda --precision bf16 --micro-batch 16 --batch 64

The model is a stock Llava of AIMv2-L at 224 px and a Qwen2.5-0.5B, both random; the rows are 64 of
`llava_shaped.SHAPES` in LLaVA's JSON. Both sides take the same rows in the same steps, with
`torch.optim.AdamW`, a constant learning rate, LoRA of rank 16 on all linear layers of the LLM, the
same precision and the same number of conversations in a micro-batch.

*Trainer*: `TrainingArguments` as they are (no grouping by length: rows come in random order), the
model's own processor in the collator, padded to the longest, only answers supervised.
*Ours*: the stage of a recipe in the project's own loop; in `align-second-epoch` with the features
that the pass before the first epoch kept, which is not counted. Trainer's epochs are all alike.

Each side runs in processes of its own, which take turns, each on its part of the rows. Seconds,
processor seconds and memory count from the reading of the first row to the end of the last
optimiser step, after one forward and backward of a short row that warms up.

The losses of the two are those of the same tokens and agree to about 1e-4 in the first step:
pictures are cut to a square before they are resized here, and after it there, where the longer side
is a whole number of pixels. Later steps of LoRA also differ by its first weights, drawn by each.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from llava_shaped import LLMS, assembled, write_models, write_rows
from measure import clock, forget_peak, in_a_child, peak_gib
from torch.optim.optimizer import register_optimizer_step_post_hook

from aimv2_mllm import heap
from aimv2_mllm.data.order import EpochOrder, mixed
from aimv2_mllm.data.pairs.batches import world_seed
from aimv2_mllm.engine.distributed import Ranks
from aimv2_mllm.engine.loop import train
from aimv2_mllm.engine.metrics import METRICS_FILE
from aimv2_mllm.model.foreign import best_device
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.data import ConversationData
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.stages.table import STAGES

MODES = ("tune", "align-second-epoch")
SIDES = ("trainer", "ours")
LR = 1e-4


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=MODES, default="tune")
    parser.add_argument("--quick", action="store_true", help="base tower, 0.1b LLM, 16 rows")
    parser.add_argument("--tower", choices=("nano", "base", "large"), default="large")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--llm", choices=tuple(LLMS), default="0.5b")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="rows of an optimiser step")
    parser.add_argument("--micro-batch", type=int, default=2, help="rows of a forward pass")
    parser.add_argument("--tokens", type=int, help="in its place, of a forward pass of ours")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--checkpointing", action="store_true", help="of activations, both sides")
    parser.add_argument("--compile", action="store_true", help="ours, by torch.compile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--sides", default=",".join(SIDES), help=argparse.SUPPRESS)
    parser.add_argument(
        "--child", nargs=3, metavar=("SIDE", "ROUND", "FOLDER"), help=argparse.SUPPRESS
    )
    args = parser.parse_args(words)
    if args.quick:
        args.tower, args.llm, args.rows, args.rounds = "base", "0.1b", 16, 1
    return args


class Meter:
    """Seconds, processor seconds and the most memory from `start` to the last optimiser step."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)
        register_optimizer_step_post_hook(self._stepped)

    def start(self) -> None:
        """Count from here, the first time it is called."""
        if self._first is None:
            forget_peak(best_device())
            self._first = self._now()

    def _now(self) -> tuple[float, float]:
        return clock(best_device()), time.process_time()

    def _stepped(self, *_: Any) -> None:
        self._last = self._now()

    def found(self) -> dict[str, float]:
        """What was measured."""
        assert self._first is not None
        seconds, processor = (b - a for a, b in zip(self._first, self._last, strict=True))
        return {"seconds": seconds, "processor": processor, "gib": peak_gib(best_device())}


def recipe_of(args: argparse.Namespace, folder: Path, steps: int) -> Recipe:
    """The recipe of ours: an align stage, and for `tune` one that starts from its result."""
    common: dict[str, Any] = {
        "data": {
            "sources": [{"kind": "llava", "file": str(folder / "rows.json")}],
            "image_aspect": "crop",  # as transformers' own processor has it
        },
        "train": {
            "steps": steps,
            "batch_size": args.batch,
            "micro_batch_size": None if args.tokens else args.micro_batch,
            "micro_batch_tokens": args.tokens,
            "lr": LR,
            "final_lr": LR,
            "betas": [0.9, 0.95],
            "precision": args.precision,
            "activation_checkpointing": args.checkpointing,
            "compile": args.compile,
            "device": args.device,
            "log_every": 1,
        },
    }
    align = {"kind": "align", "tower": str(folder / "tower"), "llm": str(folder / "llm"), **common}
    tune = {"kind": "tune", "start": "align", "lora": {"r": 16, "alpha": 32}, **common}
    if args.mode != "tune":
        common["data"]["features"] = {"folder": str(folder / "features")}
    stages = {"align": align, "tune": tune} if args.mode == "tune" else {"align": align}
    return Recipe.model_validate({"name": "tuning", "output": folder / "run", "stages": stages})


def ours(args: argparse.Namespace, folder: Path, first: int, steps: int) -> dict[str, Any]:
    """Steps `first` to `first + steps` of the stage, in the project's loop."""
    recipe = recipe_of(args, folder, first + steps)
    name = "tune" if args.mode == "tune" else "align"
    stage = recipe.stages[name]
    heap.map_large()  # as a run does
    torch.manual_seed(0)
    job = STAGES[stage.kind].build(stage, Place(recipe, folder / "run"))
    if job.prepare is not None:
        job.prepare(job, Ranks(), lambda _: None)
    meter = Meter()
    warm_up(lambda batch: job.objective(job.model, batch, {"text": 1}).total, job.batches(0)[0])

    def batches(step: int) -> list[Any]:
        meter.start()
        return job.batches(first + step)

    with TemporaryDirectory() as written:
        train(
            job.model, job.parts, job.objective, batches,
            config=stage.train.model_copy(update={"steps": steps}), seed=0,
            folder=Path(written), fingerprint="",
            narrate=lambda _: None,
        )  # fmt: skip
        text = (Path(written) / METRICS_FILE).read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    told = {
        "losses": [line["text"] for line in lines],
        "rates": [line["samples_per_s"] for line in lines],
    }
    return {**meter.found(), **told}


def trainers(args: argparse.Namespace, folder: Path, first: int, steps: int) -> dict[str, Any]:
    """The same rows in as many steps of transformers' Trainer."""
    from padded_trainer import Rows, trainer

    from aimv2_mllm.model import mllm

    if args.mode == "tune":
        from peft import LoraConfig, get_peft_model

        base, processor = mllm.load_llava(folder / "run" / "align" / "model")
        layers = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
        target = rf".*\.language_model\..*\.({layers})"
        model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=target))
    else:
        base, processor = assembled(folder)
        model = base.requires_grad_(False)
    base.model.multi_modal_projector.requires_grad_(True)
    meter = Meter()
    rows = Rows(folder / "rows.json", numbers(args, first, steps))
    with TemporaryDirectory() as written:
        made = trainer(model, processor, rows, args, Path(written), LR)
        warm_up(lambda batch: made.model(**batch).loss, made.data_collator([rows[0]]))
        rows.when_read = meter.start
        made.train()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    return {**meter.found(), "losses": losses}


def numbers(args: argparse.Namespace, first: int, steps: int) -> list[int]:
    """The rows that ours has in those steps, in its order."""
    order = EpochOrder([args.rows], mixed(world_seed(0, ConversationData()), 1, 0))
    return [order.row(place) for place in range(first * args.batch, (first + steps) * args.batch)]


def warm_up(loss_of: Callable[[Any], Any], batch: Any) -> None:
    """One forward and backward on a processor, whose first one is slower; nothing is kept of it."""
    if not torch.cuda.is_available():
        loss_of(batch).backward()


def child(args: argparse.Namespace) -> dict[str, Any]:
    """One turn of one side, in this process."""
    side, turn, folder = args.child
    steps = args.rows // args.batch // args.rounds
    run = ours if side == "ours" else trainers
    return run(args, Path(folder), int(turn) * steps, steps)


def report(args: argparse.Namespace, words: list[str]) -> None:
    """Run both sides in turns; print the table."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides.split(",")}
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, args.rows)
        write_models(folder, args.tower, args.image_size, LLMS[args.llm])
        if args.mode == "tune":
            model, processor = assembled(folder)
            for one in (model, processor):
                one.save_pretrained(folder / "run" / "align" / "model")
            del model
        for turn in range(args.rounds):
            for side, done in runs.items():
                done.append(in_a_child("tuning.py", *words, "--child", side, str(turn), name))
    print(f"{args.mode}: aimv2_{args.tower} at {args.image_size} px, LLM {args.llm}, {args.rows} "
          f"rows, {args.batch} a step, {args.micro_batch} at once"
          f"{f' (ours: {args.tokens:,} tokens)' if args.tokens else ''}, {args.precision}, "
          f"{args.device}, {torch.get_num_threads()} threads"
          f"{', checkpointing' * args.checkpointing}{', compiled' * args.compile}")  # fmt: skip
    print(f"{'':9}{'seconds':>9}{'rows/s':>9}{'processor s':>13}{'GiB':>8}   loss of each step")
    totals = {}
    for side, done in runs.items():
        seconds, processor = (sum(run[key] for run in done) for key in ("seconds", "processor"))
        totals[side] = seconds, processor, max(run["gib"] for run in done)
        losses = " ".join(f"{loss:.4f}" for run in done for loss in run["losses"])
        print(f"{side:9}{seconds:9.1f}{args.rows / seconds:9.3f}{processor:13.1f}"
              f"{totals[side][2]:8.2f}   {losses}")  # fmt: skip
        if rates := [f"{rate:.3f}" for run in done for rate in run.get("rates", [])]:
            print(f"{'':9}rows/s of each step: {' '.join(rates)}")
    if len(totals) == 2:
        ours, other = totals["ours"], totals["trainer"]
        print(f"ratio    {other[0] / ours[0]:9.2f}{'':9}{other[1] / ours[1]:13.2f}"
              f"{ours[2] / other[2]:8.2f}")  # fmt: skip


def main() -> None:
    words = sys.argv[1:]
    args = parse(words)
    if args.child:
        print(json.dumps(child(args)))
    else:
        report(args, words)


if __name__ == "__main__":
    main()
