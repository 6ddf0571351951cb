"""Train detectors of roadwork in street photos, or any ``nn.Module``, on one machine or many.

The names below are imported when first used, so that ``import roadwork_dist`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roadwork_dist.config.experiment import ExperimentConfig
    from roadwork_dist.config.schema import (
        CheckpointConfig,
        EmaConfig,
        OptimConfig,
        ScheduleConfig,
        TrackingConfig,
        TrainConfig,
    )
    from roadwork_dist.events.callback import Callback
    from roadwork_dist.inference.predictor import Predictor
    from roadwork_dist.models.detector import RoadworkModel
    from roadwork_dist.training.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "Callback": "roadwork_dist.events.callback",
    "CheckpointConfig": "roadwork_dist.config.schema",
    "EmaConfig": "roadwork_dist.config.schema",
    "ExperimentConfig": "roadwork_dist.config.experiment",
    "OptimConfig": "roadwork_dist.config.schema",
    "Predictor": "roadwork_dist.inference.predictor",
    "RoadworkModel": "roadwork_dist.models.detector",
    "ScheduleConfig": "roadwork_dist.config.schema",
    "TrackingConfig": "roadwork_dist.config.schema",
    "TrainConfig": "roadwork_dist.config.schema",
    "Trainer": "roadwork_dist.training.trainer",
}

__all__ = [
    "Callback",
    "CheckpointConfig",
    "EmaConfig",
    "ExperimentConfig",
    "OptimConfig",
    "Predictor",
    "RoadworkModel",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainConfig",
    "Trainer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'roadwork_dist' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
