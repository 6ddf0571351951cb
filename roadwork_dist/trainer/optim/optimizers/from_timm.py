"""Optimizers from timm (``timm.optim``)."""

from torch import nn
from torch.optim import Optimizer

from roadwork_dist.trainer.config import OptimConfig
from roadwork_dist.trainer.optim.groups import parameter_groups
from roadwork_dist.trainer.optim.optimizers.base import OPTIMIZERS


@OPTIMIZERS.register("lion", state_bytes=4)
def lion(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Lion (Chen et al., arXiv 2302.06675); use a third to a tenth of AdamW's learning rate."""
    from timm.optim.lion import Lion

    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    return Lion(groups, lr=config.lr, betas=config.betas)


@OPTIMIZERS.register("lamb", state_bytes=8, needs=frozenset({"whole matrices"}))
def lamb(model: nn.Module, config: OptimConfig) -> Optimizer:
    """LAMB (You et al., arXiv 1904.00962): AdamW's step, scaled for each tensor by its norm."""
    from timm.optim.lamb import Lamb

    groups = parameter_groups(model, config.weight_decay, config.layer_decay)
    return Lamb(groups, lr=config.lr, betas=config.betas, eps=config.eps, max_grad_norm=None)
