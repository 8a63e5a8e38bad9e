"""Freed memory stays with a process, or goes back to the system."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from aimv2_mllm import heap

of_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")


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


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells")
def test_what_a_process_has_in_memory_is_told() -> None:
    before = heap.resident()
    more = bytearray(b"x") * 2**26
    assert 2**25 < heap.resident() - before < 2**27
    assert len(more) == 2**26


@of_glibc
def test_glibc_takes_all_settings() -> None:
    assert heap.keep_freed() is True
    assert heap.map_large() is True


@of_glibc
def test_what_was_kept_goes_back_to_the_system_when_asked() -> None:
    code = (
        "import torch\n"
        "from pathlib import Path\n"
        "from aimv2_mllm.heap import keep_freed, give_back\n"
        "def resident(): return int(Path('/proc/self/statm').read_text().split()[1]) >> 8\n"
        "keep_freed()\n"
        "large, last = torch.ones(2**25), torch.ones(2**20)\n"
        "full = resident()\n"
        "del large\n"
        "kept = resident()\n"
        "give_back()\n"
        "print(full - kept, full - resident())\n"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    kept, released = map(int, said.stdout.split())  # MiB
    assert kept < 8
    assert 120 < released < 140


@of_glibc
def test_large_tensors_leave_no_holes() -> None:
    code = (
        "import torch\n"
        "from pathlib import Path\n"
        "from aimv2_mllm.heap import map_large\n"
        "def resident(): return int(Path('/proc/self/statm').read_text().split()[1]) >> 8\n"
        "map_large()\n"
        "before, held = resident(), []\n"
        "for _ in range(10):\n"  # what is held lies beside what was freed, as in a forward pass
        "    freed = torch.ones(2**22)\n"
        "    held.append(torch.ones(2**22))\n"
        "    del freed\n"
        "print(resident() - before)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 155 < int(said.stdout) < 200  # MiB, 160 of them held


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: pytest.fail("asked for a library"))
    heap.share_pools()
    assert heap.keep_freed() is False
    assert heap.give_back() is False


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    heap.share_pools()
    assert heap.keep_freed() is False
    assert heap.give_back() is False
