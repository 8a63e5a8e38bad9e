"""The accelerators that a plan can be made for, and the machine at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from aimv2_mllm.engine.flops import PEAKS, peak
from aimv2_mllm.engine.precision import has_bf16
from aimv2_mllm.errors import UsageError, nearest


@dataclass(frozen=True)
class Accelerator:
    """What a device can do: its memory in bytes, operations per second with bf16 and fp32."""

    name: str
    memory: int
    has_bf16: bool
    bf16: float
    fp32: float
    is_shared: bool = False  # by all processes, as a machine's own memory is

    def peak(self, precision: str) -> float:
        """Operations per second at most."""
        return self.bf16 if precision == "bf16" and self.has_bf16 else self.fp32


# Name -> torch's name of it in `PEAKS`; memory in 10^9 bytes and fp32 operations per second outside
# of the tensor cores, both of NVIDIA's data sheets.
ACCELERATORS = {
    "a100-40": ("NVIDIA A100-SXM4-40GB", 40, 19.5e12),
    "a100": ("NVIDIA A100-SXM4-80GB", 80, 19.5e12),
    "h100": ("NVIDIA H100 80GB HBM3", 80, 67e12),
    "h100-pcie": ("NVIDIA H100 PCIe", 80, 51e12),
    "h200": ("NVIDIA H200", 141, 67e12),
    "gh200": ("NVIDIA GH200 480GB", 96, 67e12),
    "b200": ("NVIDIA B200", 180, 75e12),
    "l40s": ("NVIDIA L40S", 48, 91.6e12),
    "l4": ("NVIDIA L4", 24, 30.3e12),
    "rtx4090": ("NVIDIA GeForce RTX 4090", 24, 82.6e12),
    "rtx3090": ("NVIDIA GeForce RTX 3090", 24, 35.6e12),
}


def accelerator(name: str | None) -> Accelerator:
    """The accelerator called `name`, or the device at hand; UsageError for an unknown name."""
    if name is None:
        return _at_hand()
    if name not in ACCELERATORS:
        known = f"{', '.join(ACCELERATORS)}{nearest(name, ACCELERATORS)}"
        raise UsageError(f"--accelerator: there is no {name}; there is {known}")
    key, memory, fp32 = ACCELERATORS[name]
    return Accelerator(key, memory * 10**9, True, PEAKS[key], fp32)


def _at_hand() -> Accelerator:
    if torch.cuda.is_available():
        device = torch.device("cuda")
        about = torch.cuda.get_device_properties(device)
        name, memory = about.name, about.total_memory
    else:
        device = torch.device("cpu")
        name = "this machine's processor"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    half = has_bf16(device)
    fp32 = peak(device, "fp32")
    bf16 = peak(device, "bf16") if half else fp32
    return Accelerator(name, memory, half, bf16, fp32, is_shared=device.type == "cpu")
