"""Optimizers by name. Every module in this folder may register some."""

from roadwork_dist.common.registry import import_modules
from roadwork_dist.trainer.optim.optimizers.base import OPTIMIZERS, build_optimizer, check_needs

__all__ = ["OPTIMIZERS", "build_optimizer", "check_needs"]

import_modules(__name__, __path__)
