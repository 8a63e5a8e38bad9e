"""Alignment's later epochs with kept features against without, and reading one against computing.

    OMP_NUM_THREADS=1 python tests/benchmarks/features.py [--samples 4] [--rounds 3]

By default an AIMv2-L of 224 px and an LLM of the sizes of Qwen2.5-0.5B, both random, and JPEGs of
640 x 480 with a caption each. The stage is built as a recipe builds it; both ways take turns on one
model, a round being a step of each, forward to optimiser, with its samples made. On a CPU the
seconds are those of the processor, which nobody else's work changes; on CUDA, the clock's.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava_shaped import write_models, write_picture
from measure import CPU, seconds

from aimv2_mllm.data.features.store import FeatureStore
from aimv2_mllm.engine.distributed import Ranks
from aimv2_mllm.engine.training import Run, Training
from aimv2_mllm.place import Place
from aimv2_mllm.recipe.schema import Recipe
from aimv2_mllm.stages.llms import build_align

WORDS = ("a", "photo", "of", "something", "that", "nobody", "has", "seen", "where", "there", "is")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tower", choices=("nano", "base", "large"), default="large")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--llm-width", type=int, default=896)
    parser.add_argument("--llm-depth", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--connector", default="mlp")
    parser.add_argument("--samples", type=int, default=4, help="of a step, each with its picture")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def written(folder: Path, args: argparse.Namespace) -> Recipe:
    """A tower, an LLM, pictures and captions in `folder`, and the recipe of them."""
    width = args.llm_width
    sizes = (width, width * 38 // 7, args.llm_depth, width // 64, 2, args.vocab)  # 4864 of 896
    write_models(folder, args.tower, args.image_size, sizes)
    random, rows = np.random.default_rng(0), []
    for number in range(args.samples):
        write_picture(folder / f"{number}.jpg", random)
        said = " ".join(random.choice(WORDS, 20))
        talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": said}]
        rows.append({"image": f"{number}.jpg", "conversations": talk})
    (folder / "rows.json").write_text(json.dumps(rows))
    align = {
        "kind": "align",
        "tower": str(folder / "tower"),
        "llm": str(folder / "llm"),
        "connector": {"name": args.connector},
        "data": {
            "template": "plain",
            "sources": [{"kind": "llava", "file": str(folder / "rows.json")}],
            "features": {"folder": str(folder / "kept")},
        },
        "train": {
            "steps": 2,
            "batch_size": args.samples,
            "lr": 1e-3,
            "device": args.device,
            "precision": args.precision,
        },
    }
    stages = {"align": align}
    return Recipe.model_validate({"name": "f", "output": folder / "run", "stages": stages})


def main() -> None:
    """Print what a step takes in both ways, and what a picture's features do."""
    args = parse()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = written(folder, args)
        stage: Any = recipe.stages["align"]
        job = build_align(stage, Place(recipe, recipe.output))
        assert job.prepare is not None
        prepare = job.prepare
        made = seconds(lambda: prepare(job, Ranks(), print), device)
        print(
            f"the pass, its pictures and those of a blank: {made / (args.samples + 1):.3f} s each"
        )
        batches: Any = job.batches
        nothing = replace(batches, features=FeatureStore(folder / "none", "none", 1.0))
        training = Training(job.model.train(), job.parts, Run(stage.train, folder, "", Ranks()))

        def step(of: Any) -> None:
            training.gradients(job.objective, of(1), 1)
            training.optimizer.step()

        ways = {"kept": batches, "computed": nothing}
        for way in ways.values():
            step(way)
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, of in ways.items():
                taken[way].append(seconds(lambda of=of: step(of), device) / args.samples)
        for way, times in taken.items():
            print(f"{way:9} {statistics.median(times):8.4f} s a sample, the median of {len(times)}")
        pairs = zip(taken["computed"], taken["kept"], strict=True)
        ratios = sorted(without / kept for without, kept in pairs)
        middle = statistics.median(ratios)
        print(f"ratio     {middle:8.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) in samples a second")
        per_picture(batches, nothing, args)


def per_picture(batches: Any, nothing: Any, args: argparse.Namespace) -> None:
    """Print what a sample takes to be made, with its features read or its pixels decoded."""
    counts = {"read": batches, "decoded": nothing}
    for word, of in counts.items():
        taken = [seconds(lambda of=of: of(1), CPU) / args.samples for _ in range(5)]
        print(f"{word:9} {1000 * statistics.median(taken):8.2f} ms a sample to make it")


if __name__ == "__main__":
    main()
