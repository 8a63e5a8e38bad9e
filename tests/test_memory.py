"""Freed memory stays with the process."""

import platform

import pytest

from aimv2_mllm.engine import memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_glibc_takes_both_settings() -> None:
    assert memory.keep_freed_memory() is True


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is False
