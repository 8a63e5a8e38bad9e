"""What a process on a processor holds beside the tensors of a micro-batch, each thing by its cause.

Not counted: what is in memory for a moment while a result is saved, which is less than a step takes
or lies in files that the system can put aside.
"""

import gc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from aimv2_mllm import heap
from aimv2_mllm.engine.upcoming import worth_a_thread
from aimv2_mllm.engine.workers import STEPS_AHEAD
from aimv2_mllm.planning.planned import Beside, StagePlan
from aimv2_mllm.stages.job import Job
from aimv2_mllm.stages.table import STAGES

# Code and buffers of the kernels, which a dry run never calls.
KERNELS = 40 * 2**20
# What lies unused between small tensors when micro-batches differ in size, in units of the most
# that these take. Adapters' gradients, which live until the step is taken, are made in the midst of
# what backward frees, and what is free between them fits few tensors of the next micro-batch, or of
# the next block that is computed again. Both measured by tests/benchmarks/stage_memory.py, with
# glibc 2.36.
AMONG_ADAPTERS, ELSEWHERE = 1.0, 0.4


def beside(
    job: Job, outline: StagePlan, batch: Mapping[str, Any], small: int, aside: int
) -> Beside:
    """What the process of a stage holds beside its tensors and `aside`, where small tensors take
    `small` in a micro-batch like `batch`, of which nothing is computed again."""
    gc.collect()
    heap.give_back()
    # What a stage imports its plan has imported.
    libraries = heap.resident() + KERNELS
    workers, cpu = job.data.workers, torch.device("cpu")
    ahead = STEPS_AHEAD * workers if workers else worth_a_thread(cpu)
    number = max(outline.num_micro_batches, 1) * (1 + ahead) - 1
    size = sum(value.nbytes for value in tree_leaves(batch) if isinstance(value, Tensor))
    unused = AMONG_ADAPTERS if "lora" in job.parts else ELSEWHERE
    if STAGES[outline.kind].is_even:
        unused = 0.0
    return Beside(libraries, number * size, aside, int(unused * small))
