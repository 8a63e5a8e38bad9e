"""Print how time and memory of a pre-training step grow with batch, image size and captions.

    python tests/benchmarks/scaling.py --size base          # about 10 minutes on 2 CPU cores
    python tests/benchmarks/scaling.py --size large --device cuda --batches 32,64,128,256

Each row is a process of its own (`pretrain_step.py`, our side): the least of its counted steps, its
peak memory, and the share of the measured rate of products that it reaches.
"""

import argparse

import torch
from measure import build, caption_batch, forward_flops, in_a_child, matmul_rate

from aimv2_mllm.engine.precision import has_bf16


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = ("nano", "base", "large", "huge", "1b", "3b")
    parser.add_argument("--size", choices=sizes, default="base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--batches", default="1,2,4,8")
    parser.add_argument("--image-sizes", default="112,224,336,448")
    parser.add_argument("--captions", default="10,40,77")
    parser.add_argument("--steps", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse()
    batches, sizes, captions = (
        [int(word) for word in words.split(",")]
        for words in (args.batches, args.image_sizes, args.captions)
    )
    middle = (batches[len(batches) // 2], 224, 40)
    rows = [(batch, *middle[1:]) for batch in batches]
    rows += [(middle[0], size, middle[2]) for size in sizes]
    rows += [(*middle[:2], caption) for caption in captions]
    device = torch.device(args.device)
    bf16 = args.precision == "bf16" and has_bf16(device)
    rate = matmul_rate(device, torch.bfloat16 if bf16 else torch.float32)
    print(f"{args.size} on {args.device}, {args.precision}, products at {rate / 1e12:.3f} TFLOP/s")
    print("batch  pixels  caption  tokens       s  ms/token     GiB  of rate")
    for batch, size, caption in dict.fromkeys(rows):
        done = in_a_child(
            "pretrain_step.py", "--side", "ours", "--size", args.size, "--batch", str(batch),
            "--image-size", str(size), "--captions", str(caption), "--vocab", str(args.vocab),
            "--device", args.device, "--precision", args.precision, "--steps", str(args.steps),
        )  # fmt: skip
        seconds = min(sum(step) for step in done["steps"])
        tokens = batch * ((size // 14) ** 2 + 1 + caption)
        with torch.device("meta"):
            model = build(args.size, size, args.vocab)
        flops = 3 * forward_flops(model, caption_batch(batch, size, [caption], args.vocab))
        print(
            f"{batch:5}{size:8}{caption:9}{tokens:8}{seconds:8.3f}{1e3 * seconds / tokens:10.3f}"
            f"{done['gib']:8.2f}{flops / rate / seconds:9.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
