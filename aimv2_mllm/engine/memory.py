"""The allocator of a training process, told that a step needs what the step before it freed."""

import ctypes

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
NEVER, LARGE = 2**31 - 1, 2**30  # bytes


def keep_freed_memory() -> bool:
    """Keep what is freed on the processor for what is allocated next; False without glibc.

    By default glibc gives every large tensor back to the system when it is freed, and the system
    clears each of its pages anew for the next step. Measured on a pre-training step on two cores:
    8 to 10 % of its time, against 1 % more memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(MMAP_THRESHOLD, LARGE), mallopt(TRIM_THRESHOLD, NEVER)])
