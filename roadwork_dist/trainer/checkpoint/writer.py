"""Saves checkpoints in the foreground or background, and reports how long they blocked training."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from roadwork_dist.common.background import Background, HostCopy
from roadwork_dist.trainer.events.callback import Run

logger = logging.getLogger(__name__)

_PATIENCE_S = 300.0
"""How long a run that ends with an error waits for a save in progress."""

Store = Callable[[Mapping[str, Tensor]], int]
"""Stores tensors and returns the bytes; all ranks call it together, and it fails on all or none."""


@dataclass
class _Pending:
    step: int
    job: Background
    blocked: float


class CheckpointWriter:
    """Saves one checkpoint at a time and reports how long each blocked training.

    A save waits for the background save in progress. The latter's error is raised on all ranks at the same
    point: before the next save, or after the next step, where the ranks then agree to leave the loop.

    Args:
        in_background: training waits only until the tensors are copied to host memory.
    """

    def __init__(self, in_background: bool) -> None:
        self.in_background = in_background
        self._copy = HostCopy()
        self._pending: _Pending | None = None
        self._last_save = time.perf_counter()

    def save(
        self, run: Run, tensors: Mapping[str, Tensor], store: Store, *, started: float, wait: bool
    ) -> None:
        """Save the current state, after :meth:`finish`. All ranks call it together.

        Args:
            run: receives the figures, as kind ``checkpoint``.
            tensors: of the checkpoint.
            store: stores them.
            started: when this save began to block training.
            wait: until it is stored, whatever the settings.

        Raises:
            CheckpointError: on all ranks, if it was not saved.
        """
        step, device = run.state.step, run.accelerator.device
        if wait or not self.in_background:
            size = store(tensors)
            seconds = time.perf_counter() - started
            self._report(run, step, seconds, seconds, size)
            return
        copies = self._copy(tensors)
        job = Background(lambda: store(copies), device, lambda: _request_stop(run))
        self._pending = _Pending(step, job, time.perf_counter() - started)

    def finish(self, run: Run) -> None:
        """Wait for a save in the background. All ranks call it together.

        Raises:
            CheckpointError: on all ranks, if it failed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        started = time.perf_counter()
        try:
            size = pending.job.wait()
        except BaseException:
            run.interrupt_requested = False  # it was requested because of this error
            raise
        blocked = pending.blocked + time.perf_counter() - started
        self._report(run, pending.step, blocked, pending.blocked + pending.job.seconds, size)

    def abandon(self) -> None:
        """Wait for a background save to finish after training ended with an error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.job.wait(_PATIENCE_S)
            except Exception as error:  # must not hide the error that came first
                logger.warning("the checkpoint of step %d was not saved: %s", pending.step, error)
        self._copy.close()

    def close(self) -> None:
        """Free the memory of copies."""
        self._copy.close()

    def _report(self, run: Run, step: int, blocked: float, total: float, size: int) -> None:
        now = time.perf_counter()
        since, self._last_save = now - self._last_save, now
        figures = {
            "step": step,
            "seconds_blocked": round(blocked, 4),
            "seconds_total": round(total, 4),
            "blocked_share": round(min(1.0, blocked / since), 4),
            "bytes": size,
        }
        run.tell("checkpoint", figures)


def _request_stop(run: Run) -> None:
    """Let every rank leave the loop after the current step, where the error is raised."""
    run.interrupt_requested = True
