"""Freed memory stays with the process until it is released."""

import platform
import subprocess
import sys

import pytest

from aimv2_mllm.engine import memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_glibc_takes_both_settings() -> None:
    assert memory.keep_freed_memory() is True


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_what_was_kept_goes_back_to_the_system_when_asked() -> None:
    code = (
        "import torch\n"
        "from pathlib import Path\n"
        "from aimv2_mllm.engine.memory import keep_freed_memory, release_freed_memory\n"
        "def resident(): return int(Path('/proc/self/statm').read_text().split()[1]) >> 8\n"
        "keep_freed_memory()\n"
        "large, last = torch.ones(2**25), torch.ones(2**20)\n"
        "full = resident()\n"
        "del large\n"
        "kept = resident()\n"
        "release_freed_memory()\n"
        "print(full - kept, full - resident())\n"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    kept, released = map(int, said.stdout.split())  # MiB
    assert kept < 8
    assert 120 < released < 140


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is False
    assert memory.release_freed_memory() is False
