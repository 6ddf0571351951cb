"""Train detectors of roadwork in street photos, or any ``nn.Module``, on one machine or many.

The names below are imported when first used, so that ``import roadwork_dist`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from roadwork_dist.config.schema import ExperimentConfig, TrainConfig

__version__ = "0.1.0"

_HOMES = {
    "ExperimentConfig": "roadwork_dist.config.schema",
    "TrainConfig": "roadwork_dist.config.schema",
}

__all__ = ["ExperimentConfig", "TrainConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'roadwork_dist' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
