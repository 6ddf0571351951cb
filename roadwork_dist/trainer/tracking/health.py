"""Performance monitoring of a run: throughput, step times, memory, MFU, and the slowest rank."""

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from roadwork_dist.trainer.engine.collectives import gather_objects, sum_over_ranks, world_size
from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import StepResult
from roadwork_dist.trainer.tracking.chips import bf16_peak
from roadwork_dist.trainer.tracking.figures import peak_memory_mb

logger = logging.getLogger(__name__)

MIB = 2**20


class _Step(NamedTuple):
    seconds: float
    waited: float
    worked: float
    rows: int
    operations: float


@dataclass(frozen=True)
class RankHealth:
    """Means of one rank over the steps of a window.

    Attributes:
        waited: seconds per step spent waiting for data.
        worked: seconds per step from the start of its forward pass to its last gradient.
        allocated, reserved, peak: MiB of memory; reserved is 0 on the CPU.
        operations: floating-point operations of the backbone per step.
    """

    waited: float
    worked: float
    allocated: float
    reserved: float
    peak: float
    operations: float

    @property
    def own(self) -> float:
        """Seconds per step of this rank's own waiting and work, excluding waits for other ranks."""
        return self.waited + self.worked


class Health(Callback):
    """Reports on the steps since the last report, every ``every`` steps and at the end of each epoch.

    Figures are passed to every callback as kind ``health`` (:meth:`Callback.on_figures`).

    Args:
        every: number of steps; 0 = only at the end of each epoch.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._steps: list[_Step] = []
        self._hosts: list[str] = []
        self._peak: float | None = None

    def on_fit_start(self, run: Run) -> None:
        """Collect the host of each rank and look up the peak of the device."""
        self._hosts = gather_objects(socket.gethostname())
        device = run.accelerator.device
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            self._peak = bf16_peak(name)
            if self._peak is None and run.accelerator.is_main_process:
                logger.info("the bf16 peak of %s is not known, so backbone_mfu is not reported", name)

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Record the step; report if it is time."""
        waited = result.data_wait * result.seconds
        self._steps.append(_Step(result.seconds, waited, result.work_s, result.rows, result.operations))
        is_epoch_end = run.state.step_in_epoch == run.steps_per_epoch
        # The report is a collective: all ranks count the same steps, so they report at the same step.
        if is_epoch_end or (self.every and run.state.step % self.every == 0):
            self._report(run)

    def _report(self, run: Run) -> None:
        steps, self._steps = self._steps, []
        ranks = share_health(own_health(run, steps), run.accelerator.process_index, run.accelerator.device)
        run.tell("health", health_figures(steps, ranks, self._hosts, self._peak))


def own_health(run: Run, steps: Sequence[_Step]) -> RankHealth:
    """Means over this rank's steps, and its current memory."""
    device = run.accelerator.device
    if device.type == "cuda":
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    else:
        allocated, reserved = psutil.Process().memory_info().rss, 0
    return RankHealth(
        waited=fmean(step.waited for step in steps),
        worked=fmean(step.worked for step in steps),
        allocated=allocated / MIB,
        reserved=reserved / MIB,
        peak=peak_memory_mb(run),
        operations=fmean(step.operations for step in steps),
    )


def share_health(own: RankHealth, rank: int, device: torch.device) -> list[RankHealth]:
    """Every rank's figures, by rank. A collective: one small all-reduce; each rank fills its own slots."""
    own_slots = list(vars(own).values())
    slots = [0.0] * (world_size() * len(own_slots))
    slots[rank * len(own_slots) : (rank + 1) * len(own_slots)] = own_slots
    slots = sum_over_ranks(slots, device)
    width = len(own_slots)
    return [RankHealth(*slots[start : start + width]) for start in range(0, len(slots), width)]


def health_figures(
    steps: Sequence[_Step], ranks: Sequence[RankHealth], hosts: Sequence[str], peak: float | None
) -> dict[str, Any]:
    """The figures of a window.

    Args:
        steps: steps of this rank; with synchronous gradients they take the same time on all ranks.
        ranks: means of every rank.
        hosts: host of every rank.
        peak: bf16 peak of each rank's chip in operations per second; None = not known.
    """
    seconds = [step.seconds for step in steps]
    total = sum(seconds)
    samples = sum(step.rows for step in steps) / total
    p50, p95 = np.percentile(seconds, [50, 95])
    figures: dict[str, Any] = {
        "steps": len(steps),
        "samples_per_s": round(samples, 2),
        "samples_per_s_per_rank": round(samples / len(ranks), 2),
        "data_wait": round(fmean(rank.waited for rank in ranks) * len(steps) / total, 4),
        "step_s_p50": round(float(p50), 6),
        "step_s_p95": round(float(p95), 6),
        # The rank with the most memory in use runs out first.
        "memory_allocated_mb": round(max(rank.allocated for rank in ranks), 1),
        "memory_peak_mb": round(max(rank.peak for rank in ranks), 1),
    }
    if any(rank.reserved for rank in ranks):
        figures["memory_reserved_mb"] = round(max(rank.reserved for rank in ranks), 1)
    rate = fmean(rank.operations for rank in ranks) * len(steps) / total
    if rate:
        figures["backbone_tflops"] = round(rate / 1e12, 4)
        if peak is not None:
            figures["backbone_mfu"] = round(rate / peak, 4)
    return figures | straggler(ranks, hosts, fmean(seconds))


def straggler(ranks: Sequence[RankHealth], hosts: Sequence[str], step_seconds: float) -> dict[str, Any]:
    """The rank that the others wait for, and the share of a step that they wait.

    The wait is how much longer the slowest rank works (including waiting for its data) than the median of
    the others. Empty with a single rank.
    """
    if len(ranks) < 2:
        return {}
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].own)
    others = [rank for number, rank in enumerate(ranks) if number != slowest]
    excess = ranks[slowest].own - median(rank.own for rank in others)
    from_data = ranks[slowest].waited - median(rank.waited for rank in others)
    return {
        "slowest_rank": slowest,
        "slowest_host": hosts[slowest],
        "slowest_share": round(max(0.0, excess) / step_seconds, 4),
        "slowest_cause": "data" if from_data > excess / 2 else "compute",
    }
