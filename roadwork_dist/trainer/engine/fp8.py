"""fp8 matrix multiplication in the linear layers of repeated blocks, through torchao."""

import torch
from torch import nn

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.optional import require
from roadwork_dist.trainer.engine.blocks import repeated_blocks

LEAST_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs with fp8 tensor cores (Ada, Hopper)."""
_MULTIPLE = 16
"""The widths of an fp8 product have to be multiples of this (cuBLASLt)."""


def use_fp8(model: nn.Module, device: torch.device, *, emulate: bool = False) -> list[str]:
    """Make layers multiply in fp8 with dynamic per-tensor scales, in place; weights stay in fp32.

    Converts the linear layers of repeated blocks whose widths are multiples of 16, where the products are
    large. First and last layers are unchanged (as in torchao's own recipe), and so are parameters and names.

    Args:
        model: not yet wrapped by an engine.
        device: where it will run.
        emulate: compute with rounded fp32 numbers on any device, to see the effect of fp8 on the metrics.

    Returns:
        Names of the converted layers.

    Raises:
        ConfigError: the device has no fp8 units, or the model no such layer.
        MissingDependencyError: torchao is not installed.
    """
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY):
        got = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type}"
        raise ConfigError(
            "precision is 'fp8', which needs a GPU of compute capability 8.9 or newer (Ada, Hopper, "
            f"Blackwell), and the device is {got}: use bf16"
        )
    float8 = require("torchao.float8", extra="fp8", purpose="precision fp8")
    inside = {id(module) for block in repeated_blocks(model) for module in block.modules()}
    names = [name for name, module in model.named_modules() if id(module) in inside and _fits(module)]
    if not names:
        raise ConfigError(
            f"precision is 'fp8', but {type(model).__name__} has no repeated block with a linear layer whose "
            "widths are multiples of 16: use bf16"
        )
    float8.convert_to_float8_training(
        model,
        module_filter_fn=lambda _, name: name in names,
        # In the backward pass the number of rows of a batch is an inner width, and it can be any number.
        config=float8.Float8LinearConfig(pad_inner_dim=True, emulate=emulate),
    )
    return names


def _fits(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Linear)
        and module.in_features % _MULTIPLE == 0
        and module.out_features % _MULTIPLE == 0
    )
