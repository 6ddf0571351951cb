"""Train detectors of roadwork in street photos, or any ``nn.Module``, on one machine or many.

The names below are imported when first used, so that ``import roadwork_dist`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roadwork_dist.config.experiment import ExperimentConfig
    from roadwork_dist.detector.detector import RoadworkModel
    from roadwork_dist.inference.predictor import Predictor
    from roadwork_dist.trainer.config import (
        CheckpointConfig,
        EmaConfig,
        OptimConfig,
        ScheduleConfig,
        TrackingConfig,
        TrainConfig,
    )
    from roadwork_dist.trainer.events.callback import Callback
    from roadwork_dist.trainer.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "Callback": "roadwork_dist.trainer.events.callback",
    "CheckpointConfig": "roadwork_dist.trainer.config",
    "EmaConfig": "roadwork_dist.trainer.config",
    "ExperimentConfig": "roadwork_dist.config.experiment",
    "OptimConfig": "roadwork_dist.trainer.config",
    "Predictor": "roadwork_dist.inference.predictor",
    "RoadworkModel": "roadwork_dist.detector.detector",
    "ScheduleConfig": "roadwork_dist.trainer.config",
    "TrackingConfig": "roadwork_dist.trainer.config",
    "TrainConfig": "roadwork_dist.trainer.config",
    "Trainer": "roadwork_dist.trainer.trainer",
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
