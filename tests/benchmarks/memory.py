"""Print the memory that a plan foretells beside what a training step takes.

    python tests/benchmarks/memory.py --size base --batches 1,4
    python tests/benchmarks/memory.py --size large --batches 32,128 --device cuda --precision bf16

On a CPU: what torch allocates, as its profiler has it, and what the process grew by; on a CUDA
device: what its allocator had at most. Each row is a process of its own.
"""

import argparse
import json
import sys
from typing import Any

import torch
from measure import build, caption_batch, in_a_child, most_allocated, peak_gib
from pretrain_step import END, TRAIN

from aimv2_mllm import heap
from aimv2_mllm.engine.optimizer import build_optimizer
from aimv2_mllm.engine.precision import autocast, has_bf16
from aimv2_mllm.engine.rehearsal import rehearse
from aimv2_mllm.engine.strategies import keep_inputs
from aimv2_mllm.formats import GIB
from aimv2_mllm.objective import PreTrainingObjective

WORDS, CAPTION = 32000, 40


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("nano", "base", "large", "huge"), default="base")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def estimated(args: argparse.Namespace, batch: int, checkpointing: bool) -> float:
    """GiB of weights, optimiser, gradients and activations, as a plan has them."""
    with torch.device("meta"):
        model = build(args.size, args.image_size, WORDS)
    footprint = rehearse(
        model,
        PreTrainingObjective(14, END),
        caption_batch(batch, args.image_size, [CAPTION], WORDS),
        half=args.precision == "bf16" and has_bf16(torch.device(args.device)),
        checkpointing=checkpointing,
        words=WORDS,
        gradients_before=False,
    )
    weights = sum(p.nbytes for p in model.parameters())
    return (3 * weights + footprint.gradients + footprint.activations) / GIB


def measured(args: argparse.Namespace) -> dict[str, float]:
    """GiB that torch allocates at most, and that the process grew by, in steps after the first."""
    device = torch.device(args.device)
    heap.keep_freed()
    steps(args, "nano", 1, 1)  # what is loaded once is no part of it
    before = peak_gib(device) if device.type == "cpu" else 0.0
    model, batch, optimizer = steps(args, args.size, args.measure, 2)
    if device.type == "cuda":
        return {"torch": peak_gib(device), "process": peak_gib(device)}
    grown = peak_gib(device) - before
    kept = 3 * sum(p.nbytes for p in model.parameters()) + sum(t.nbytes for t in batch.values())
    optimizer.zero_grad()
    most = most_allocated(lambda: backward(args, model, batch))
    return {"torch": (kept + most) / GIB, "process": grown}


def backward(args: argparse.Namespace, model: Any, batch: Any) -> None:
    """One forward and backward pass."""
    objective = PreTrainingObjective(14, END)
    with autocast(torch.device(args.device), args.precision):
        total = objective(model, batch, objective.targets(batch)).total
    total.backward()


def steps(args: argparse.Namespace, size: str, batch_size: int, count: int) -> Any:
    """Take `count` steps; the model, its batch and its optimiser."""
    device = torch.device(args.device)
    model = build(size, args.image_size, WORDS).to(device)
    if args.checkpointing:
        keep_inputs(model)
    optimizer = build_optimizer({"model": list(model.named_parameters())}, TRAIN)
    batch: Any = caption_batch(batch_size, args.image_size, [CAPTION], WORDS)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    for _ in range(count):
        optimizer.zero_grad()
        backward(args, model, batch)
        optimizer.step()
    return model, batch, optimizer


def main() -> None:
    args = parse(sys.argv[1:])
    if args.measure:
        print(json.dumps(measured(args)))
        return
    print(f"{args.size}, {args.image_size} px, {args.precision}, {args.device}, GiB")
    print("batch  checkpointing  estimate   torch  process  estimate/torch  estimate/process")
    for batch in map(int, args.batches.split(",")):
        for word in ("", "--checkpointing"):
            foretold = estimated(args, batch, bool(word))
            words = [*sys.argv[1:], "--measure", str(batch), *[word] * bool(word)]
            found = in_a_child("memory.py", *words)
            ratios = f"{foretold / found['torch']:16.3f}{foretold / found['process']:18.3f}"
            line = f"{batch:5}{'yes' if word else 'no':>15}{foretold:10.3f}{found['torch']:8.3f}"
            print(f"{line}{found['process']:9.3f}{ratios}", flush=True)


if __name__ == "__main__":
    main()
