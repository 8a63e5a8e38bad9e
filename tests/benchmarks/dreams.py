"""What a key-value cache saves in painting and captioning.

    OMP_NUM_THREADS=1 python tests/benchmarks/dreams.py [SIZE]

Random weights of an encoder (base by default) with the authors' decoder, 224 px, half of the 256
patches shown, one picture, float32 on the CPU. Seconds of the processor, which nobody else's work
changes. Every step without a cache costs the same, so a few are timed and counted up; their outcome
is held against the cached one's.
"""

import sys

import torch
from measure import CPU, build, timed
from torch import Tensor

from aimv2_mllm.model.incremental import PatchByPatch, WordByWord
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, Predictions
from aimv2_mllm.objective import patchify

PREFIX, TIMED, WORDS, VOCAB = 128, 2, 32, 32_000


def painted(model: AIMv2ForPreTraining, pixels: Tensor) -> Tensor:
    """What is said of each patch behind the prefix, with the cache."""
    patches = patchify(pixels, 14)
    next_patch = PatchByPatch(model, (16, 16))
    said = [next_patch(patches[:, :PREFIX])]
    said += [next_patch(patches[:, i : i + 1]) for i in range(PREFIX, patches.shape[1] - 1)]
    return torch.stack(said, 1)


def spoken(model: AIMv2ForPreTraining, pixels: Tensor, words: Tensor) -> Tensor:
    """The scores before each of `words` and behind the last, with the cache."""
    saying = WordByWord(model, pixels)
    logits = [saying.logits]
    for word in words.T:
        saying.append(word)
        logits.append(saying.logits)
    return torch.stack(logits, 1)


def at_once(
    model: AIMv2ForPreTraining, pixels: Tensor, prefix: int, words: Tensor
) -> tuple[float, Predictions]:
    """The seconds of a step without a cache, and what it says of all patches and words."""
    length = torch.tensor([words.shape[1]])

    def steps() -> Predictions:
        return [model(pixels, torch.tensor([prefix]), words, length) for _ in range(TIMED)][-1]

    taken, said = timed(steps, CPU)
    return taken / TIMED, said


@torch.inference_mode()
def main(size: str) -> None:
    """Print seconds for all patches and words with and without the cache, and the difference."""
    model = build(size, 224, VOCAB).eval()
    pixels = torch.randn(1, 3, 224, 224)
    count = model.encoder.config.num_patches

    cached, ours = timed(lambda: painted(model, pixels), CPU)
    no_words = torch.zeros((1, 0), dtype=torch.int64)
    each, whole = at_once(model, pixels, PREFIX, no_words)
    steps = count - PREFIX
    tell(f"{size}, {steps} patches", cached, each * steps, ours, whole.patches[:, PREFIX - 1 : -1])

    words = torch.randint(VOCAB, (1, WORDS))
    cached, ours = timed(lambda: spoken(model, pixels, words), CPU)
    each, whole = at_once(model, pixels, count, words)
    tell(f"{size}, {WORDS} words", cached, each * (WORDS + 1), ours, whole.words)


def tell(what: str, cached: float, uncached: float, said: Tensor, whole: Tensor) -> None:
    """Print both times, and how far both outcomes differ."""
    difference = float((said - whole).abs().max() / whole.std())
    print(
        f"{what}: {cached:.1f} s with the cache, {uncached:.0f} s without, "
        f"{uncached / cached:.1f} times as fast; they differ by {difference:.1e} of the spread",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "base")
