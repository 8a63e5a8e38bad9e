"""Our tower behind LLaVA against LLaVA's own CLIP tower of equal FLOPs, side by side.

    OMP_NUM_THREADS=1 python tests/benchmarks/llava_tower.py [--rounds 20] [--batch 1]

Both have random weights, 768 wide, 12 blocks, 224 px in patches of 14; AIMv2's feed-forward is a
SwiGLU of 2048 and CLIP's an MLP of 3072, which cost the same. LLaVA builds both and calls both as
in training. On the CPU in float32, seconds of the processor, which nobody else's work changes; on
CUDA in float16, with the clock. A round is a call of each, in turns.
"""

import argparse
import importlib
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import build_encoder, seconds
from safetensors.torch import save_file

from aimv2_mllm.engine.flops import FlopCounter
from aimv2_mllm.model.weights import save_encoder
from aimv2_mllm.towers.llava import install

PIXELS = {
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
}


def towers(folder: Path) -> dict[str, Any]:
    """Both towers, as LLaVA builds them."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    save_encoder(build_encoder("base"), folder / "aimv2")
    clip = CLIPVisionModel(CLIPVisionConfig(patch_size=14))  # 768 wide, 12 blocks, 224 px
    clip.config.save_pretrained(folder / "clip")
    save_file(clip.state_dict(), folder / "clip/model.safetensors", metadata={"format": "pt"})
    for name in ("aimv2", "clip"):
        (folder / name / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    install()
    builder = importlib.import_module("llava.model.multimodal_encoder.builder")
    names = {"ours": f"aimv2:{folder / 'aimv2'}", "clip": str(folder / "clip")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    return {
        key: builder.build_vision_tower(
            SimpleNamespace(vision_tower=name, mm_vision_select_layer=-1)
        ).to(device=device, dtype=dtype)
        for key, name in names.items()
    }


def main() -> None:
    """Print GFLOPs and the median of seconds of both, and the median ratio of the rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        both = towers(Path(folder))
        images = torch.randn(args.batch, 3, 224, 224, device=both["ours"].device)
        flops = {}
        for key, tower in both.items():
            with FlopCounter() as counter:
                tower(images)
            flops[key] = counter.flops / 1e9
        times: dict[str, list[float]] = {key: [] for key in both}
        for number in range(args.rounds):
            for key in sorted(both, reverse=number % 2 == 0):
                times[key].append(seconds(partial(both[key], images), images.device))
    ratios = [ours / clip for ours, clip in zip(times["ours"], times["clip"], strict=True)]
    for key in both:
        print(f"{key:4} {flops[key]:.1f} GFLOP, {statistics.median(times[key]):.4f} s")
    print(f"ratio {statistics.median(ratios):.3f}, of {args.rounds} rounds")


if __name__ == "__main__":
    main()
