"""Preemption: on SIGTERM or SIGUSR1 all ranks agree to stop, save and leave."""

import json
import logging
import signal
import socket
import threading
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any

from roadwork_dist.common.errors import InterruptedRunError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.trainer.engine.collectives import gather_objects
from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import StepResult

logger = logging.getLogger(__name__)

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # Windows has no SIGUSR1
INTERRUPTED = "interrupted.json"
"""File in the run folder after a run stopped on request, until it is started again."""


@dataclass(frozen=True)
class Request:
    """One rank's view of a request to stop."""

    rank: int
    host: str
    signal: str | None  # None = not requested by a signal


class Preemption(Callback):
    """Treats SIGTERM and SIGUSR1 as a request to stop during training.

    The handler only records the request. The checkpointer then saves, and every rank raises
    :class:`InterruptedRunError`: after the current step (the reduction of its losses shares the request with
    all ranks), after a batch of a validation, which is aborted, or at the end of the epoch. So this callback
    must come after the checkpointer. Further signals have no effect. The previous handlers are restored when
    training ends. Python allows handlers only in the main thread, so none are installed in other threads.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, Any] = {}
        self._requests: list[Request] = []

    def on_fit_start(self, run: Run) -> None:
        """Install the handlers."""
        if threading.current_thread() is not threading.main_thread():
            logger.warning("not training in the main thread: SIGTERM and SIGUSR1 end the run without saving")
            return
        self._signal, self._requests = None, []

        # Do nothing else here: the handler may interrupt any line of Python, even one that holds a lock.
        def ask(number: int, frame: FrameType | None) -> None:
            self._signal = number
            run.interrupt_requested = True

        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, ask)

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Leave if any rank was asked to; the checkpointer has saved this step.

        Raises:
            InterruptedRunError: on every rank.
        """
        if result.interrupted:  # the same on all ranks
            self._leave(run, gather_objects(self._request(run)))

    def on_validation_interrupted(self, run: Run) -> None:
        """Leave if any rank was asked to during the validation; the checkpointer has saved.

        Raises:
            InterruptedRunError: on every rank.
        """
        self._leave(run, gather_objects(self._request(run)))

    def on_epoch_end(self, run: Run) -> None:
        """Leave if any rank was asked to since the last check of the validation.

        Raises:
            InterruptedRunError: on every rank.
        """
        if run.is_leaving:  # the same on all ranks; the checkpointer has waited for its save
            self._leave(run, gather_objects(self._request(run)))

    def on_fit_end(self, run: Run) -> None:
        """Restore the handlers."""
        self._put_back()

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Note in the run folder that the run stopped on request, and restore the handlers."""
        try:
            if isinstance(error, InterruptedRunError) and run.accelerator.is_main_process:
                self._write_note(run)
        finally:
            self._put_back()

    def _request(self, run: Run) -> Request | None:
        if not run.interrupt_requested:
            return None
        name = signal.Signals(self._signal).name if self._signal is not None else None
        return Request(run.accelerator.process_index, socket.gethostname(), name)

    def _leave(self, run: Run, requests: list[Request | None]) -> None:
        self._requests = [request for request in requests if request is not None]
        run.interrupt_requested = False  # so that another call of fit() continues
        names = sorted({request.signal for request in self._requests if request.signal})
        raise InterruptedRunError(
            f"asked to stop{' by ' + ', '.join(names) if names else ''}: state saved at step "
            f"{run.state.step} of {run.total_steps} in {run.run_dir}; start again with the same arguments "
            "to resume from there"
        )

    def _write_note(self, run: Run) -> None:
        names = [request.signal for request in self._requests if request.signal]
        note = {
            "signal": names[0] if names else None,
            "step": run.state.step,
            "epoch": run.state.epoch,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "asked": [asdict(request) for request in self._requests],
        }
        write_atomic(run.run_dir / INTERRUPTED, json.dumps(note, indent=1).encode() + b"\n")

    def _put_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None: a handler that was not installed from Python cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
