"""Metrics of an optimizer step, with the same names for all trackers."""

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from roadwork_dist.trainer.events.callback import Run
from roadwork_dist.trainer.events.state import StepResult

_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, or KiB on Linux


def peak_memory_mb(run: Run) -> float:
    """Peak memory in MiB so far: device memory on a GPU, else resident memory of this process."""
    if run.accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(run.accelerator.device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT / 2**20


class MemoryGauge:
    """Reads the peak at most once a second, since reading it can cost a millisecond on a busy machine."""

    def __init__(self) -> None:
        self._next_look, self._value = 0.0, 0.0

    def peak_mb(self, run: Run) -> float:
        """:func:`peak_memory_mb`, up to a second old."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look, self._value = now + 1.0, peak_memory_mb(run)
        return self._value


_gauge = MemoryGauge()


def step_figures(run: Run, result: StepResult) -> dict[str, Any]:
    """One optimizer step: loss and parts, lr, gradient norm, speed, waiting, memory."""
    return {
        "loss": result.loss,
        **{f"loss/{part}": value for part, value in result.parts.items()},
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "samples_per_s": round(result.rows / result.seconds, 2),
        "data_wait": round(result.data_wait, 4),
        "memory_mb": round(_gauge.peak_mb(run), 1),
    }


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """The numeric figures, which can be plotted over steps."""
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}
