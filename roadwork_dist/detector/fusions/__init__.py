"""Methods that fuse the views of a photo, by name. Every module of this folder may register one."""

from roadwork_dist.common.registry import import_modules
from roadwork_dist.config.experiment import ModelConfig
from roadwork_dist.detector.fusions.base import FUSIONS, FusedViews, ViewFusion

__all__ = ["FUSIONS", "FusedViews", "ViewFusion", "build_fusion", "fusion_name"]

import_modules(__name__, __path__)


def fusion_name(config: ModelConfig) -> str:
    """Name of the fusion that ``model.view_fusion`` means: true = gated, false = mean."""
    name = config.view_fusion
    return name if isinstance(name, str) else ("gated" if name else "mean")


def build_fusion(config: ModelConfig) -> ViewFusion:
    """The configured fusion.

    Raises:
        ConfigError: there is none of that name.
    """
    return FUSIONS[fusion_name(config)](config.width)
