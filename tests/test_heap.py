"""Memory that was freed goes back to the system."""

import sys
from pathlib import Path

import pytest

from aimv2_mllm import heap


def held() -> int:
    """The pages that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone keeps it")
def test_what_was_freed_below_something_that_lives_goes_back() -> None:
    # Small enough to lie in the heap, and what comes last keeps its end where it is.
    many = [bytearray(60_000) for _ in range(1000)]  # 60 MB
    last = bytearray(60_000)
    del many
    before = held()
    heap.give_back()
    assert before - held() > 5000  # pages of 4 KiB
    assert len(last) == 60_000


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: pytest.fail("asked for a library"))
    heap.share_pools()
    heap.give_back()
