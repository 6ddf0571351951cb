"""SGD with momentum from torch."""

import torch
from torch import nn
from torch.optim import Optimizer

from roadwork_dist.trainer.config import OptimConfig
from roadwork_dist.trainer.optim.groups import parameter_groups
from roadwork_dist.trainer.optim.optimizers.base import OPTIMIZERS


@OPTIMIZERS.register("sgd", state_bytes=4)
def sgd(model: nn.Module, config: OptimConfig) -> Optimizer:
    """SGD with Nesterov momentum; the first of ``optim.betas`` is the momentum."""
    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0], nesterov=config.betas[0] > 0)
