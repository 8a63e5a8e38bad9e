"""What a key-value cache saves in painting and captioning.

    OMP_NUM_THREADS=1 python tests/benchmarks/dreams.py [SIZE]

Random weights of an encoder (aimv2_base by default) with the authors' decoder, 224 px, half of the
256 patches shown, one picture, float32 on the CPU. Seconds of the processor, which nobody else's
work changes. Every step without a cache costs the same, so a few are timed and counted up; their
outcome is held against the cached one's.
"""

import sys
import time

import torch

from aimv2_mllm.model.encoder import SIZES, AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.incremental import PatchByPatch, WordByWord
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, DecoderConfig
from aimv2_mllm.objective import patchify

PREFIX, TIMED, WORDS = 128, 2, 32


@torch.inference_mode()
def main(size: str) -> None:
    """Print seconds for all patches and words with and without the cache, and the difference."""
    torch.manual_seed(0)
    encoder = AIMv2Encoder(EncoderConfig(**SIZES[size]))
    model = AIMv2ForPreTraining(encoder, DecoderConfig()).eval()
    pixels = torch.randn(1, 3, 224, 224)
    patches, count = patchify(pixels, 14), encoder.config.num_patches
    no_words = torch.zeros((1, 0), dtype=torch.int64)

    begun = time.process_time()
    next_patch = PatchByPatch(model, (16, 16))
    said = [next_patch(patches[:, :PREFIX])]
    said += [next_patch(patches[:, i : i + 1]) for i in range(PREFIX, count - 1)]
    cached = time.process_time() - begun
    begun = time.process_time()
    for _ in range(TIMED):
        whole = model(pixels, torch.tensor([PREFIX]), no_words, torch.tensor([0])).patches
    each, steps = (time.process_time() - begun) / TIMED, count - PREFIX
    rows = (torch.stack(said, 1), whole[:, PREFIX - 1 : -1])
    _tell(f"{size}, {steps} patches", cached, each * steps, *rows)

    words = torch.randint(32_000, (1, WORDS))
    begun = time.process_time()
    saying = WordByWord(model, pixels)
    logits = [saying.logits]
    for word in words.T:
        saying.append(word)
        logits.append(saying.logits)
    cached = time.process_time() - begun
    begun = time.process_time()
    for _ in range(TIMED):
        whole = model(pixels, torch.tensor([count]), words, torch.tensor([WORDS])).words
    each = (time.process_time() - begun) / TIMED
    _tell(f"{size}, {WORDS} words", cached, each * (WORDS + 1), torch.stack(logits, 1), whole)


def _tell(what: str, cached: float, uncached: float, *rows: torch.Tensor) -> None:
    said, whole = rows
    difference = float((said - whole).abs().max() / whole.std())
    print(
        f"{what}: {cached:.1f} s with the cache, {uncached:.0f} s without, "
        f"{uncached / cached:.1f} times as fast; they differ by {difference:.1e} of the spread",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "aimv2_base")
