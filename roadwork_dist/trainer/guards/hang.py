"""Hang detection: names the rank that blocks the run and where it hangs, then ends the process.

In every rank one thread checks every few seconds whether the loop has made progress (a batch, a step, a
phase). Another writes the rank's heartbeat to ``health/rank-<number>.json`` in the run folder. A rank
without progress for ``hang_timeout`` reads the heartbeats of all ranks, determines which ranks are to blame,
writes the stacks of its own threads to ``health/rank-<number>.stacks.txt`` and ends its process. The loop
itself only counts batches.

All times are monotonic times of this process. Heartbeats of other ranks are only compared with their own
earlier ones, so clocks of other machines do not matter.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import StepResult
from roadwork_dist.trainer.guards.heartbeat import (
    Heartbeat,
    blame,
    innermost_lines,
    read_heartbeats,
    silent_ranks,
    write_heartbeat,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER = "health"
EXIT_HANG = 70
"""EX_SOFTWARE of sysexits.h: the process was ended because the run made no progress."""
_CHECKS_PER_TIMEOUT = 20
_MAX_CHECK_INTERVAL_S = 30.0
_CHECKS_AFTER_TIMEOUT = 3


class HangWatch(Callback):
    """Ends the process when the run makes no progress for too long.

    Args:
        timeout: seconds without a new batch, step or phase; the process ends at most a fifth of it later.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.interval = min(timeout / _CHECKS_PER_TIMEOUT, _MAX_CHECK_INTERVAL_S)
        self.phase = "starting"
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def on_fit_start(self, run: Run) -> None:
        """Start watching."""
        self.phase, self._ended = "starting", threading.Event()
        arguments = (run, threading.get_ident(), self._ended)
        self._threads = [
            threading.Thread(target=task, args=arguments, daemon=True, name="hang watch")
            for task in (self._watch, self._write)
        ]
        for each in self._threads:
            each.start()

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Set the phase: training, including what other callbacks do after a step."""
        self.phase = "training"

    def on_validation_start(self, run: Run) -> None:
        """Set the phase: validation."""
        self.phase = "validation"

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """Set the phase: end of the epoch."""
        self.phase = "end of epoch"

    def on_validation_interrupted(self, run: Run) -> None:
        """Set the phase: saving and leaving."""
        self.phase = "leaving a validation"

    def on_fit_end(self, run: Run) -> None:
        """Stop watching."""
        self._stop()

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Stop watching."""
        self._stop()

    def _stop(self) -> None:
        self._ended.set()
        for each in self._threads:
            each.join(1.0)  # with a timeout, because the writer may be blocked by the file system

    def _place(self, run: Run) -> tuple[int, int, str]:
        """What changes as long as the run makes progress."""
        return run.state.step, run.batches_read, self.phase

    def _heartbeat(self, run: Run, beat: int, where: list[str]) -> Heartbeat:
        rank = run.accelerator.process_index
        return Heartbeat(rank, socket.gethostname(), os.getpid(), beat, *self._place(run), where)

    def _write(self, run: Run, thread: int, ended: threading.Event) -> None:
        """Write heartbeats. In a thread of its own, since a hanging file system must not stop the watch."""
        folder = run.run_dir / FOLDER
        beat, place = 0, None
        while not ended.is_set():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # While the run makes progress nobody needs its stack, and reading it would disturb threads.
                place, before = self._place(run), place
                where = innermost_lines(thread) if place == before else []
                write_heartbeat(folder, self._heartbeat(run, beat, where))
            except OSError as error:  # e.g. a full disk: saving reports it; this rank counts as silent
                logger.debug("%s cannot be written: %s", folder, error)
            beat += 1
            ended.wait(self.interval)

    def _watch(self, run: Run, thread: int, ended: threading.Event) -> None:
        still, looked, place = 0.0, time.monotonic(), self._place(run)
        while not ended.wait(self.interval):
            now = time.monotonic()
            # While this process is stopped itself (a suspended job, a debugger), time must not count.
            still += min(now - looked, 3 * self.interval)
            looked = now
            if self._place(run) != place:
                still, place = 0.0, self._place(run)
            if still > self.timeout:
                self._end(run, thread, ended)

    def _end(self, run: Run, thread: int, ended: threading.Event) -> None:
        """Report which ranks are to blame and end this process, unless the run makes progress after all."""
        ranks, folder, place = run.accelerator.num_processes, run.run_dir / FOLDER, self._place(run)

        def read() -> list[Heartbeat | None] | None:
            return _in_time(lambda: read_heartbeats(folder, ranks), 2 * self.interval)

        before = read()
        for _ in range(_CHECKS_AFTER_TIMEOUT):
            if ended.wait(self.interval) or self._place(run) != place:
                return
        now = read()
        own = self._heartbeat(run, 0, _in_time(lambda: innermost_lines(thread), 2 * self.interval) or [])
        if before is None or now is None:
            logger.error(
                "no progress for %.0f s, and the file system of %s does not answer: %s",
                self.timeout,
                run.run_dir,
                own,
            )
        elif own.rank == min(set(range(ranks)) - set(silent_ranks(before, now)), default=own.rank):
            logger.error("%s", verdict(before, now, self.timeout, folder))
        else:  # another rank reports for all: wait, because the launcher ends every rank when one ends
            ended.wait(2 * self.interval)
        _in_time(lambda: _dump_stacks(folder / f"rank-{own.rank}.stacks.txt"), 2 * self.interval)
        logging.shutdown()
        sys.stdout.flush()
        os._exit(EXIT_HANG)


def verdict(before: list[Heartbeat | None], now: list[Heartbeat | None], timeout: float, folder: Path) -> str:
    """The message that names the ranks that block the run."""
    guilty, why = blame(before, now)
    names = [str(now[rank] or f"rank {rank} (no heartbeat)") for rank in guilty[:8]]
    others = f" and {len(guilty) - 8} more" if len(guilty) > 8 else ""
    return (
        f"no progress for {timeout:.0f} s: {'; '.join(names)}{others} {why}; "
        f"stacks are in {folder}, the last checkpoint is untouched, start again to resume from it"
    )


def _dump_stacks(path: Path) -> None:
    with path.open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def _in_time(function: Callable[[], T], seconds: float) -> T | None:
    """The result of a function; None if it fails or takes longer (its thread then keeps running)."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
