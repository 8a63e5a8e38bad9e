"""Measure a pre-training step against the same step in plain PyTorch (`plain.py`).

    python tests/benchmarks/pretrain_step.py --size large --batch 4          # 2 CPU cores, 13 GiB
    python tests/benchmarks/pretrain_step.py --device cuda --batch 256       # one accelerator
    python tests/benchmarks/pretrain_step.py --device cuda --batch 256 --inference

Each side runs in a process of its own, one after the other, in pairs; the first step of each is not
counted. Prints seconds (least and median of all steps) and peak memory of both sides, their ratio
(least and median over pairs), the difference of their first losses, and the floor: the FLOPs that
cannot be avoided over the measured rate of this machine's products.
"""

import argparse
import json
import sys
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from measure import (
    END,
    build,
    caption_batch,
    clock,
    forward_flops,
    in_a_child,
    matmul_rate,
    peak_gib,
)
from plain import PlainPreTraining
from torch import nn

from aimv2_mllm import heap
from aimv2_mllm.engine.optimizer import build_optimizer
from aimv2_mllm.engine.precision import autocast, has_bf16
from aimv2_mllm.objective import PreTrainingObjective
from aimv2_mllm.recipe.train import TrainConfig

PHASES = ("forward", "backward", "optimiser")
# The paper's, L (section 3 and the appendix).
TRAIN = TrainConfig(steps=1000, batch_size=1, lr=1e-3, warmup_steps=0, weight_decay=0.1)


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = ("nano", "base", "large", "huge", "1b", "3b")
    parser.add_argument("--size", choices=sizes, default="large")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--captions", default="12,25,40,77", help="their lengths, over and over")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a process")
    parser.add_argument("--inference", action="store_true", help="the encoder alone, no gradients")
    parser.add_argument("--side", choices=("plain", "ours"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def one_side(args: argparse.Namespace) -> dict[str, Any]:
    """The seconds of each phase of each counted step, the losses, and the peak memory."""
    device = torch.device(args.device)
    batch = caption_batch(args.batch, args.image_size, lengths(args), args.vocab)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    model: nn.Module = build(args.size, args.image_size, args.vocab)
    objective = PreTrainingObjective(14, END)
    if args.side == "plain":
        model = PlainPreTraining(model).to(device)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    else:
        heap.keep_freed()  # as the engine does
        model = model.to(device)
        optimizer = build_optimizer({"model": list(model.named_parameters())}, TRAIN)
    parameters = list(model.parameters())
    steps: list[list[float]] = []
    losses: list[float] = []
    for _ in range(args.steps + 1):
        times = [clock(device)]
        optimizer.zero_grad()
        with products(args, device):
            if args.side == "plain":
                loss = model.loss(batch, END)
            else:
                loss = objective(model, batch, objective.targets(batch)).total  # type: ignore[arg-type]
        losses.append(loss.item())
        times.append(clock(device))
        loss.backward()
        times.append(clock(device))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        times.append(clock(device))
        steps.append([end - start for start, end in pairwise(times)])
    return {"steps": steps[1:], "losses": losses, "gib": peak_gib(device)}


def inference(args: argparse.Namespace) -> dict[str, Any]:
    """The same of the encoder without gradients: bidirectional attention, features of a batch."""
    device = torch.device(args.device)
    batch = caption_batch(args.batch, args.image_size, lengths(args), args.vocab)
    pixels = batch["pixel_values"].to(device)
    model = build(args.size, args.image_size, args.vocab)
    if args.side == "plain":
        model = PlainPreTraining(model)  # type: ignore[assignment]
    model = model.to(device).eval()
    steps = []
    with torch.inference_mode(), products(args, device):
        for _ in range(args.steps + 1):
            start = clock(device)
            features = model.encode(pixels) if args.side == "plain" else model.encoder(pixels)  # type: ignore[operator]
            steps.append([clock(device) - start, 0.0, 0.0])
    return {
        "steps": steps[1:],
        "losses": [features.float().square().mean().item()],
        "gib": peak_gib(device),
    }


def products(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """Ours as the engine has it; plain PyTorch emulates bfloat16 where it has to."""
    if args.side == "ours":
        return autocast(device, args.precision)
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def lengths(args: argparse.Namespace) -> list[int]:
    return [int(word) for word in args.captions.split(",")]


def report(args: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """Run both sides, print the table, and give its numbers."""
    device = torch.device(args.device)
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "ours": []}
    for _ in range(args.pairs):
        for side, done in runs.items():
            done.append(in_a_child("pretrain_step.py", *words, "--side", side))
    totals = {
        side: [[sum(step) for step in run["steps"]] for run in done] for side, done in runs.items()
    }
    ratios = [
        min(ours) / min(plain) for plain, ours in zip(totals["plain"], totals["ours"], strict=True)
    ]
    print(f"{args.size}, {args.image_size} px, batch {args.batch}, captions {args.captions}, "
          f"{args.precision}, {args.device}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'':8}{'least s':>9}{'median s':>9}{''.join(f'{p:>11}' for p in PHASES)}{'GiB':>8}")
    for side, done in runs.items():
        flat = [step for run in done for step in run["steps"]]
        sums = [sum(step) for step in flat]
        phases = [median(step[i] for step in flat) for i in range(3)]
        gib = max(run["gib"] for run in done)
        print(f"{side:8}{min(sums):9.3f}{median(sums):9.3f}"
              + "".join(f"{p:11.3f}" for p in phases) + f"{gib:8.2f}")  # fmt: skip
    memory = max(r["gib"] for r in runs["ours"]) / max(r["gib"] for r in runs["plain"])
    difference = abs(runs["ours"][0]["losses"][0] - runs["plain"][0]["losses"][0])
    print(f"ratio   {min(ratios):9.3f}{median(ratios):9.3f}{'memory':>41}{memory:8.2f}")
    print(f"the first losses differ by {difference:.1e}")
    bf16 = args.precision == "bf16" and has_bf16(device)
    rate = matmul_rate(device, torch.bfloat16 if bf16 else torch.float32)
    floor = flops(args) / rate
    share = floor / min(min(run) for run in totals["ours"])
    print(
        f"floor {floor:.3f} s: {flops(args):.3e} FLOP at {rate / 1e12:.3f} TFLOP/s of "
        f"{'bfloat16' if bf16 else 'float32'}; ours reaches {share:.1%} of that rate"
    )
    return {"ratio": median(ratios), "memory": memory, "loss_difference": difference}


def flops(args: argparse.Namespace) -> float:
    """The FLOPs of the products of a step (backward has two for each), or of inference."""
    with torch.device("meta"):
        model = build(args.size, args.image_size, args.vocab)
    if not args.inference:
        batch = caption_batch(args.batch, args.image_size, lengths(args), args.vocab)
        return 3 * forward_flops(model, batch)
    config = model.encoder.config
    width, tokens = config.hidden_size, config.num_patches
    block = 4 * width**2 + 3 * width * config.intermediate_size + 2 * width * tokens
    return 2.0 * args.batch * tokens * (config.num_hidden_layers * block + 588 * width)


def main(words: list[str] | None = None) -> dict[str, Any]:
    words = sys.argv[1:] if words is None else words
    args = parse(words)
    if args.side is None:
        return report(args, words)
    result = inference(args) if args.inference else one_side(args)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
