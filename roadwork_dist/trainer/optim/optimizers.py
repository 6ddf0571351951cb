"""Optimizers by name. A new one is a function here (or in a file of its own) and a test."""

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.registry import Registry
from roadwork_dist.trainer.config import OptimConfig
from roadwork_dist.trainer.optim.groups import parameter_groups

OPTIMIZERS: Registry[Callable[[nn.Module, OptimConfig], Optimizer]] = Registry("optimizer")


@OPTIMIZERS.register("adamw")
def adamw(model: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), torch's own implementation."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """The configured optimizer over the trainable parameters of ``model``.

    Raises:
        ConfigError: the name is unknown, or nothing in the model is trainable.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"{type(model).__name__} has no parameter that requires a gradient: nothing would be trained"
        )
    return OPTIMIZERS[config.name](model, config)
