"""Images per second on one core: 12-megapixel JPEGs to augmented 224-pixel samples.

    python tests/benchmarks/decode.py

Ours (`data.pictures.decode`, at the size needed) against the plain Pillow way (open, convert, crop,
resize bicubically), on the same files with the same crops, in turns. Exits with 1 below `GOAL`.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable
from statistics import median

import numpy as np
from PIL import Image

from aimv2_mllm.data.handwriting.scenes import generator
from aimv2_mllm.data.pictures.decode import Box, decode, random_crop

GOAL = 1.5
WIDTH, HEIGHT = 4000, 3000


def photographs(count: int) -> list[bytes]:
    """JPEGs of 12 megapixels with structure at all scales, about as photographs have it."""
    files = []
    for number in range(count):
        random = np.random.default_rng(number)
        picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
        for side in (4, 16, 64, 256, 1024):
            coarse = random.normal(0, 1, (side * 3 // 4, side, 3)).astype(np.float32)
            layers = [
                np.asarray(Image.fromarray(coarse[..., c]).resize((WIDTH, HEIGHT)))
                for c in range(3)
            ]
            picture += np.stack(layers, axis=-1) * (40 / side**0.3)
        buffer = io.BytesIO()
        Image.fromarray((picture + 128).clip(0, 255).astype(np.uint8)).save(
            buffer, "JPEG", quality=90
        )
        files.append(buffer.getvalue())
    return files


def plainly(content: bytes, size: int, choose: Callable[[int, int], Box]) -> np.ndarray:
    """The plain Pillow way, which decodes everything."""
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    left, top, width, height = choose(*picture.size)
    part = picture.crop((int(left), int(top), int(left + width), int(top + height)))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))


def measure(
    way: Callable[[bytes, int, Callable[[int, int], Box]], np.ndarray],
    files: list[bytes],
    size: int,
) -> float:
    """Seconds for all `files`, a random crop of each."""
    begun = time.perf_counter()
    for number, content in enumerate(files):
        random = generator(0, "crop", number)
        way(content, size, lambda w, h, random=random: random_crop(w, h, random))
    return time.perf_counter() - begun


def main() -> int:
    """Measure, print, and say by the exit code whether the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448])
    words = parser.parse_args()
    files = photographs(words.files)
    megabytes = sum(map(len, files)) / len(files) / 1e6
    print(f"{len(files)} JPEGs of {WIDTH} x {HEIGHT}, {megabytes:.1f} MB each; one core")
    worst = float("inf")
    for size in words.sizes:
        times: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(words.rounds):
            times["plain"].append(measure(plainly, files, size))
            times["ours"].append(measure(decode, files, size))
        plain, ours = (len(files) / median(times[way]) for way in ("plain", "ours"))
        worst = min(worst, ours / plain)
        print(f"{size} px: plain {plain:.2f} images/s, ours {ours:.2f}: {ours / plain:.2f} x")
    print(f"the least is {worst:.2f} x, the goal {GOAL} x")
    return 0 if worst >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
