"""Numeric precision of forward passes."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32


def in_precision(forward: Callable[..., Any], precision: str, device: torch.device) -> Callable[..., Any]:
    """The forward pass unchanged (fp32), or under bf16 autocast with its results in fp32.

    With fp8, layers of the module multiply in 8 bits (:mod:`roadwork_dist.trainer.engine.fp8`); everything
    around them runs in bf16. Neither the weights nor the module are changed.

    Args:
        forward: the module, or any callable.
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
