"""Measure encoding images of different sizes together against one by one.

    python tests/benchmarks/mixed_sizes.py --size base --images 16              # CPU
    python tests/benchmarks/mixed_sizes.py --device cuda --images 256           # bfloat16

The images are of the native stage: one area, and aspect ratios from 1:2 to 2:1. Prints seconds
(least of some, taken in turns), images a second, their ratio, and the largest difference between
the features of both ways.
"""

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
from measure import build_encoder, clock
from torch import Tensor

from aimv2_mllm.data.pairs.areas import grid
from aimv2_mllm.engine.precision import autocast


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = ("nano", "base", "large", "huge", "1b", "3b")
    parser.add_argument("--size", choices=sizes, default="large")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--area", type=int, default=256, help="most patches of an image")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def pictures(count: int, area: int, device: torch.device) -> list[Tensor]:
    """Noise in `count` sizes of at most `area` patches."""
    generator = np.random.default_rng(0)
    grids = [grid(round(1000 * 2 ** generator.uniform(-1, 1)), 1000, area) for _ in range(count)]
    torch.manual_seed(0)
    return [torch.randn(3, 14 * rows, 14 * columns, device=device) for rows, columns in grids]


@torch.inference_mode()
def main() -> None:
    args = parse()
    device = torch.device(args.device)
    encoder = build_encoder(args.size, native=True).to(device).eval()
    images = pictures(args.images, args.area, device)
    ways: dict[str, Any] = {
        "one by one": lambda: [encoder(image[None])[0] for image in images],
        "together": partial(encoder.encode_images, images),
    }
    least = dict.fromkeys(ways, float("inf"))
    features: dict[str, list[Tensor]] = {}
    with autocast(device, args.precision):
        for repeat in range(args.repeats + 1):
            for name, encode in ways.items():
                start = clock(device)
                features[name] = encode()
                if repeat:  # the first is not counted
                    least[name] = min(least[name], clock(device) - start)
    num_sizes = len({image.shape for image in images})
    print(f"{args.size}, {args.images} images of {num_sizes} sizes, {args.device}")
    for name, seconds in least.items():
        print(f"{name:12}{seconds:9.4f} s{args.images / seconds:10.1f} images/s")
    pairs = zip(features["one by one"], features["together"], strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"together is {least['one by one'] / least['together']:.2f} times as fast")
    print(f"the features differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
