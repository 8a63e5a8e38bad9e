"""The arithmetic of a step: bfloat16 where it is asked for and the device has it."""

import pytest
import torch

from aimv2_mllm.engine import precision

CPU = torch.device("cpu")


def product() -> torch.Tensor:
    return torch.ones(2, 2) @ torch.ones(2, 2)


@pytest.mark.parametrize(
    ("asked", "has", "dtype"),
    [
        ("fp32", True, torch.float32),
        ("bf16", True, torch.bfloat16),
        ("bf16", False, torch.float32),
    ],
)
def test_products_are_bfloat16_if_asked_for_and_the_device_has_them(
    asked: str, has: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: has)
    with precision.autocast(CPU, asked):
        assert product().dtype == dtype
    assert product().dtype == torch.float32


def test_a_cpu_says_whether_it_has_bfloat16_products() -> None:
    assert precision.has_bf16(CPU) in (True, False)


def test_a_cuda_device_that_would_emulate_bfloat16_does_not_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def supported(including_emulation: bool = True) -> bool:  # as a T4 or V100 answers
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert not precision.has_bf16(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert precision.has_bf16(torch.device("cuda"))
