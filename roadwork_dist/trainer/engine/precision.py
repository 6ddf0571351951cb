"""Arithmetic of forward passes."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32


def in_precision(forward: Callable[..., Any], precision: str, device: torch.device) -> Callable[..., Any]:
    """A forward pass in fp32 as it is, or under bf16 autocast with its results in fp32.

    What fp8 multiplies in 8 bits are layers of the module (:mod:`roadwork_dist.trainer.engine.fp8`); around
    them it is bf16.

    Weights stay what they are; nothing of the module is changed.

    Args:
        forward: the module, or anything to call.
        precision: ``fp32``, ``bf16`` or ``fp8``.
        device: where it runs.
    """
    if precision == "fp32":
        return forward

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return forward(*args, **kwargs)

    converted: Callable[..., Any] = convert_outputs_to_fp32(autocast)
    return converted
