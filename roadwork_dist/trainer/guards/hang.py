"""A rank that hangs is named, with the lines it hangs in, and the run ends instead of waiting for ever.

In every rank a thread looks every few seconds whether the loop has moved (a batch, a step, a phase),
and another keeps ``health/rank-<number>.json`` about it in the run folder. A rank that has not moved for
``hang_timeout`` reads what the others wrote, tells which of them is to blame, writes the stacks of its
own threads to ``health/rank-<number>.stacks.txt`` and ends its process. The loop itself does nothing
for it but count batches.

All times are this process's monotonic ones. What other ranks wrote is only compared with what they had
written a moment ago, so no clock of another machine has a part in it.
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
    Pulse,
    blame,
    innermost_lines,
    read_pulses,
    silent_ranks,
    write_pulse,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER = "health"
EXIT_HANG = 70
"""EX_SOFTWARE of sysexits.h: the process was ended because the run did not move."""
_LOOKS_PER_TIMEOUT = 20
_MOST_BETWEEN_LOOKS_S = 30.0
_LOOKS_BEHIND_TIMEOUT = 3


class HangWatch(Callback):
    """Ends the process when the run has not moved for too long.

    Args:
        timeout: seconds without a batch, a step or another phase that are too long; the verdict comes at
            most a fifth of it later.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.interval = min(timeout / _LOOKS_PER_TIMEOUT, _MOST_BETWEEN_LOOKS_S)
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
        """Training, or what other observers do behind a step."""
        self.phase = "training"

    def on_validation_start(self, run: Run) -> None:
        """Validating."""
        self.phase = "validation"

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """Behind it."""
        self.phase = "end of epoch"

    def on_validation_interrupted(self, run: Run) -> None:
        """Saving."""
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
            each.join(1.0)  # not for ever: one of them may wait for the file system

    def _place(self, run: Run) -> tuple[int, int, str]:
        """What changes as long as the run moves."""
        return run.state.step, run.batches_read, self.phase

    def _pulse(self, run: Run, beat: int, where: list[str]) -> Pulse:
        rank = run.accelerator.process_index
        return Pulse(rank, socket.gethostname(), os.getpid(), beat, *self._place(run), where)

    def _write(self, run: Run, thread: int, ended: threading.Event) -> None:
        """Keep this rank's file. A thread of its own: a file system that hangs must not stop the watch."""
        folder = run.run_dir / FOLDER
        beat, place = 0, None
        while not ended.is_set():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # Nobody looks at the stack of a run that moves, and its threads are not to be disturbed.
                place, before = self._place(run), place
                write_pulse(
                    folder, self._pulse(run, beat, innermost_lines(thread) if place == before else [])
                )
            except OSError as error:  # a full disk: saving tells of it, and this rank counts as silent
                logger.debug("%s cannot be written: %s", folder, error)
            beat += 1
            ended.wait(self.interval)

    def _watch(self, run: Run, thread: int, ended: threading.Event) -> None:
        still, looked, place = 0.0, time.monotonic(), self._place(run)
        while not ended.wait(self.interval):
            now = time.monotonic()
            # A process that was stopped itself (a suspended job, a debugger) has not waited so long.
            still += min(now - looked, 3 * self.interval)
            looked = now
            if self._place(run) != place:
                still, place = 0.0, self._place(run)
            if still > self.timeout:
                self._end(run, thread, ended)

    def _end(self, run: Run, thread: int, ended: threading.Event) -> None:
        """Name who is to blame and end this process, unless the run moves after all."""
        ranks, folder, place = run.accelerator.num_processes, run.run_dir / FOLDER, self._place(run)

        def look() -> list[Pulse | None] | None:
            return _in_time(lambda: read_pulses(folder, ranks), 2 * self.interval)

        before = look()
        for _ in range(_LOOKS_BEHIND_TIMEOUT):
            if ended.wait(self.interval) or self._place(run) != place:
                return
        now = look()
        own = self._pulse(run, 0, _in_time(lambda: innermost_lines(thread), 2 * self.interval) or [])
        if before is None or now is None:
            logger.error(
                "no progress for %.0f s, and the file system of %s does not answer: %s",
                self.timeout,
                run.run_dir,
                own,
            )
        elif own.rank == min(set(range(ranks)) - set(silent_ranks(before, now)), default=own.rank):
            logger.error("%s", verdict(before, now, self.timeout, folder))
        else:  # one tells it for all, and its launcher must not end it before
            ended.wait(2 * self.interval)
        _in_time(lambda: _dump_stacks(folder / f"rank-{own.rank}.stacks.txt"), 2 * self.interval)
        logging.shutdown()
        sys.stdout.flush()
        os._exit(EXIT_HANG)


def verdict(before: list[Pulse | None], now: list[Pulse | None], timeout: float, folder: Path) -> str:
    """The line that says who holds the run up."""
    guilty, why = blame(before, now)
    names = [str(now[rank] or f"rank {rank} (never heard of)") for rank in guilty[:8]]
    others = f" and {len(guilty) - 8} more" if len(guilty) > 8 else ""
    return (
        f"no progress for {timeout:.0f} s: {'; '.join(names)}{others} {why}; "
        f"stacks are in {folder}, the last checkpoint is untouched, start again to go on from there"
    )


def _dump_stacks(path: Path) -> None:
    with path.open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def _in_time(function: Callable[[], T], seconds: float) -> T | None:
    """What a function gives; None if it takes longer (it is left behind then) or fails."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
