"""The learning rate as a pure function of the optimizer step.

Nothing here has state, so the rate at step s is the same after a resume, with any number of
processes and with any accumulation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from roadwork_dist.common.registry import Registry
from roadwork_dist.trainer.config import ScheduleConfig

Shape = Callable[[int, int, ScheduleConfig], float]
"""(steps since the warm-up, steps after the warm-up, config) -> share of the peak in [0, 1]."""

SHAPES: Registry[Shape] = Registry("schedule")


@SHAPES.register("constant")
def constant(step: int, total: int, config: ScheduleConfig) -> float:
    """The peak throughout."""
    return 1.0


@SHAPES.register("cosine")
def cosine(step: int, total: int, config: ScheduleConfig) -> float:
    """Half a cosine from the peak to ``final_ratio`` (SGDR without restarts, arXiv 1608.03983)."""
    progress = min(1.0, step / max(1, total))
    return config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@SHAPES.register("wsd")
def wsd(step: int, total: int, config: ScheduleConfig) -> float:
    """Warm-up, stable, decay: the last ``decay_share`` falls linearly (MiniCPM, arXiv 2404.06395)."""
    decay_steps = max(1, round(config.decay_share * total))
    remaining = min(1.0, max(0, total - step) / decay_steps)
    return config.final_ratio + (1 - config.final_ratio) * remaining


@dataclass(frozen=True)
class Schedule:
    """Learning rate of a run.

    Attributes:
        peak: learning rate at the end of the warm-up.
        total_steps: optimizer steps of the whole run.
        config: shape and warm-up.

    Raises:
        ConfigError: there is no such shape.
    """

    peak: float
    total_steps: int
    config: ScheduleConfig

    def __post_init__(self) -> None:
        # Report an unknown shape now rather than at the end of the warm-up.
        _ = SHAPES[self.config.name]

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up: as configured, but at most a tenth of the run."""
        return min(self.config.warmup_steps, self.total_steps // 10)

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (0 is the first)."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        shape = SHAPES[self.config.name]
        return self.peak * shape(step - self.warmup_steps, self.total_steps - self.warmup_steps, self.config)
