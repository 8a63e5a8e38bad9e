"""What a process that serves for days keeps of memory that nobody uses any more.

Of glibc alone: other C libraries are left as they are. Without this, each thread frees into a pool
of its own, and a server's memory grows with its visitors although nothing is held of them.
"""

import ctypes
import sys
from typing import Any

M_ARENA_MAX = -8  # of glibc's malloc.h
NUM_POOLS = 2


def share_pools() -> None:
    """Let the threads that start from now on use `NUM_POOLS` pools together."""
    if set_option := _of_the_c_library("mallopt"):
        set_option(M_ARENA_MAX, NUM_POOLS)


def give_back() -> None:
    """Return what was freed to the system, in about 20 ms."""
    if trim := _of_the_c_library("malloc_trim"):
        trim(0)


def _of_the_c_library(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
