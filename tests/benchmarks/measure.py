"""What the benchmarks share: random models, a batch, children with clock and memory of their own, a
floor."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from aimv2_mllm.formats import GIB
from aimv2_mllm.model.encoder import SIZES, AIMv2Encoder, EncoderConfig
from aimv2_mllm.model.pretrainer import AIMv2ForPreTraining, DecoderConfig

END = 1  # the end token
SMALL_DECODER = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2}
HERE, CPU = Path(__file__).parent, torch.device("cpu")
T = TypeVar("T")


def build_encoder(size: str, image_size: int = 224, native: bool = False) -> AIMv2Encoder:
    """An encoder with random weights; from seed 0 on, as what is drawn after it."""
    torch.manual_seed(0)
    config = EncoderConfig(**SIZES[f"aimv2_{size}"], image_size=image_size, native=native)
    return AIMv2Encoder(config)


def build(size: str, image_size: int, vocab_size: int) -> AIMv2ForPreTraining:
    """A pre-training model; nano has the quickstart's decoder, the others the paper's."""
    small = {**SMALL_DECODER, "num_attention_heads": 2} if size == "nano" else {}
    decoder = DecoderConfig(**small, vocab_size=vocab_size)
    return AIMv2ForPreTraining(build_encoder(size, image_size), decoder)


def caption_batch(
    batch: int, image_size: int, captions: list[int], vocab: int
) -> dict[str, Tensor]:
    """Noise with captions of `captions` words, over and over; prefixes spread over 1..I-1."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([captions[i % len(captions)] for i in range(batch)])
    num_patches = (image_size // 14) ** 2
    places = torch.arange(batch) * (num_patches - 2) // max(batch - 1, 1) + 1
    return {
        "pixel_values": torch.randn(batch, 3, image_size, image_size, generator=generator),
        "prefix_length": places[torch.randperm(batch, generator=generator)],
        "caption_ids": torch.randint(2, vocab, (batch, max(captions)), generator=generator),
        "caption_length": lengths,
    }


def in_a_child(script: str, *words: str) -> dict[str, Any]:
    """What `script` of this folder prints last, as JSON, run in a process of its own."""
    command = [sys.executable, str(HERE / script), *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def clock(device: torch.device) -> float:
    """Seconds; on an accelerator after everything before has been done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def work_clock(device: torch.device) -> float:
    """Seconds of the processor, which nobody else's work changes; on an accelerator the clock's."""
    return clock(device) if device.type == "cuda" else time.process_time()


def timed(task: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """How long `task` takes, by the `work_clock`, and what it gives."""
    start = work_clock(device)
    outcome = task()
    return work_clock(device) - start, outcome


def seconds(task: Callable[[], object], device: torch.device) -> float:
    """How long `task` takes, by the `work_clock`."""
    return timed(task, device)[0]


def most_allocated(task: Callable[[], object]) -> int:
    """Bytes that torch holds at most beyond what it held before `task`, on a CPU."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiled:
        task()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def of_this_process(what: str) -> float:
    """GiB that Linux says of this process: VmRSS, what it holds, or VmHWM, what it held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [kib] = [line.split()[1] for line in lines if line.startswith(f"{what}:")]
    return int(kib) / 2**20


def peak_gib(device: torch.device) -> float:
    """The most memory that this process has held: the accelerator's, or its own (GiB)."""
    # Not by getrusage, whose ru_maxrss begins with what the parent had.
    is_cuda = device.type == "cuda"
    return torch.cuda.max_memory_allocated() / GIB if is_cuda else of_this_process("VmHWM")


def forget_peak(device: torch.device) -> None:
    """Let `peak_gib` count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large products: the best of some, forward and both kinds of backward."""
    rows = 8192 if device.type == "cuda" else 1024
    width = 8192 if device.type == "cuda" else 2048
    x, w = (torch.randn(n, width, device=device, dtype=dtype) for n in (rows, width))
    products: list[Callable[[], Tensor]] = [lambda: x @ w.T, lambda: x @ w, lambda: x.T @ x]
    best = 0.0
    for product in products:
        for _ in range(4):
            start = clock(device)
            y = product()
            seconds = clock(device) - start
            best = max(best, 2 * y.numel() * (rows if y.shape[0] == width else width) / seconds)
    return best


def forward_flops(model: AIMv2ForPreTraining, batch: dict[str, Tensor]) -> float:
    """The FLOPs of products that one forward pass cannot do without.

    Every patch goes through the encoder, every patch and word through the decoder, and only what is
    scored through the last feed-forward and the heads; attention counts what a mask lets through.
    """
    encoder, decoder = model.encoder.config, model.decoder_config
    num_patches = encoder.num_patches
    prefix, words = batch["prefix_length"].double(), batch["caption_length"].double() + 1
    tokens = num_patches + words
    scored = num_patches - prefix

    def block(config: Any) -> tuple[float, float]:
        return 4.0 * config.hidden_size**2, 3.0 * config.hidden_size * config.intermediate_size

    attention, feed = block(encoder)
    patches = num_patches * len(prefix)
    weights = patches * (encoder.num_hidden_layers * (attention + feed) + 588 * encoder.hidden_size)
    seen = (prefix**2 + (num_patches**2 - prefix**2) / 2).sum()  # pairs under the prefix mask
    pairs = encoder.num_hidden_layers * encoder.hidden_size * seen
    attention, feed = block(decoder)
    depth, width = decoder.num_hidden_layers, decoder.hidden_size
    weights += patches * width * encoder.hidden_size
    weights += tokens.sum() * (depth * attention + (depth - 1) * feed)
    weights += (scored + words).sum() * feed
    weights += scored.sum() * width * 588 + words.sum() * width * decoder.vocab_size
    pairs += depth * width * (tokens**2 / 2).sum()
    return float(2 * weights + 4 * pairs)
