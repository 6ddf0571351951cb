"""Peak bf16 throughput of accelerators, from the manufacturers' data sheets."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: common name.
        pattern: regular expression to search for in the device name that CUDA reports.
        bf16: dense peak in bf16 with fp32 accumulation, floating-point operations per second.
        source: where the figure is published.
    """

    name: str
    pattern: str
    bf16: float
    source: str


# NVIDIA's sheets often give tensor-core peaks "with sparsity"; dense is half of that.
CHIPS: tuple[Chip, ...] = (
    Chip("B200", r"\bB200\b", 2250e12, "NVIDIA HGX B200 data sheet: 4.5 PFLOP/s sparse"),
    Chip("H200 SXM", r"\bH200\b(?! NVL)", 989.4e12, "NVIDIA H200 data sheet: 1,979 TFLOP/s sparse"),
    Chip("H200 NVL", r"\bH200 NVL\b", 835.5e12, "NVIDIA H200 data sheet: 1,671 TFLOP/s sparse"),
    Chip("H100 SXM", r"\bH100 (80GB HBM3|SXM)", 989.4e12, "NVIDIA H100 data sheet: 1,979 TFLOP/s sparse"),
    Chip("H100 NVL", r"\bH100 NVL\b", 835.5e12, "NVIDIA H100 data sheet: 1,671 TFLOP/s sparse"),
    Chip("H100 PCIe", r"\bH100 PCIe\b", 756e12, "NVIDIA H100 PCIe product brief: 1,513 TFLOP/s sparse"),
    Chip("A100", r"\bA100\b", 312e12, "NVIDIA A100 data sheet: 312 TFLOP/s dense"),
    Chip("L40S", r"\bL40S\b", 362.05e12, "NVIDIA L40S data sheet: 362.05 TFLOP/s dense"),
    Chip("L4", r"\bL4\b", 121e12, "NVIDIA L4 data sheet: 242 TFLOP/s sparse"),
    Chip("RTX 4090", r"\bRTX 4090\b(?! D)", 165.2e12, "NVIDIA Ada GPU architecture paper, appendix A"),
    Chip("RTX 3090", r"\bRTX 3090\b(?! Ti)", 71e12, "NVIDIA GA102 GPU architecture paper, appendix A"),
)
"""Chips whose dense bf16 peak is published."""


def bf16_peak(device_name: str) -> float | None:
    """Dense bf16 peak of a device in operations per second, by its ``torch.cuda.get_device_name()``.

    Returns:
        None for a chip that is not in :data:`CHIPS`, and for a MIG instance, whose peak depends on the
        partitioning.
    """
    if "MIG" in device_name:
        return None
    return next((chip.bf16 for chip in CHIPS if re.search(chip.pattern, device_name)), None)
