"""AdamW from torch."""

import torch
from torch import nn
from torch.optim import Optimizer

from roadwork_dist.trainer.config import OptimConfig
from roadwork_dist.trainer.optim.groups import parameter_groups
from roadwork_dist.trainer.optim.optimizers.base import OPTIMIZERS


@OPTIMIZERS.register("adamw", state_bytes=8)
def adamw(model: nn.Module, config: OptimConfig) -> Optimizer:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
