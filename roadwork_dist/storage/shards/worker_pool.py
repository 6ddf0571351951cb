"""Pool of worker processes that report progress and end with their parent process."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from types import TracebackType
from typing import Any, Self

from roadwork_dist.common.errors import LoaderWorkerError
from roadwork_dist.common.worker import end_with_parent

Tick = Callable[[int], None]
"""Called by a job with the number of photos processed since the last call."""

_POLL_SECONDS = 0.5

_done: "Synchronized[int] | None" = None
_stop: "Synchronized[int] | None" = None


class WorkerPool:
    """Runs jobs in worker processes, or in this process.

    Args:
        workers: number of processes; 0 or 1 = run in this process.
        on_progress: called with (photos done, ``total``).
        total: number of photos in all jobs.
    """

    def __init__(self, workers: int, on_progress: Callable[[int, int], None] | None, total: int) -> None:
        self._on_progress, self._total, self._done_here = on_progress, total, 0
        self._most_waiting = 2 * workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            context = get_context("spawn")  # a child forked while torch's threads run may hang
            self._counted = context.Value("q", 0)
            self._stopped = context.Value("b", 0)
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=context,
                initializer=_begin,
                initargs=(self._counted, self._stopped, os.getpid()),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._stopped.value = kind is not None
            self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Call ``function(tick, *job)`` for every job; yields (index of the job, result) as they complete.

        Raises:
            LoaderWorkerError: a worker process was killed.
        """
        if self._pool is None:
            yield from ((number, function(self._tick, *job)) for number, job in enumerate(jobs))
            return
        waiting: dict[Future[Any], int] = {}
        left = iter(enumerate(jobs))
        try:
            while True:
                # Submit a few at a time: jobs hold their samples, and there may be thousands of jobs.
                while len(waiting) < self._most_waiting and (job := next(left, None)):
                    waiting[self._pool.submit(_in_child, function, job[1])] = job[0]
                if not waiting:
                    return
                ended, _ = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                self._report(self._counted.value)
                for future in ended:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise LoaderWorkerError(
                "a process that writes shards was killed (out of memory?): start the same command again with "
                "fewer --workers; finished shards are kept"
            ) from error

    def _tick(self, photos: int) -> None:
        self._done_here += photos
        self._report(self._done_here)

    def _report(self, done: int) -> None:
        if self._on_progress is not None:
            self._on_progress(done, self._total)


class _StoppedError(Exception):
    """Another job has failed, so this one stops."""


def _begin(done: "Synchronized[int]", stop: "Synchronized[int]", parent: int) -> None:
    import torch

    global _done, _stop
    _done, _stop = done, stop
    torch.set_num_threads(1)
    # Otherwise a writer would continue after its command was killed, which may even happen during the
    # seconds that startup takes.
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent stops its workers


def _in_child(function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    return function(_tick_in_child, *job)


def _tick_in_child(photos: int) -> None:
    assert _done is not None
    assert _stop is not None
    if _stop.value:
        raise _StoppedError
    with _done.get_lock():
        _done.value += photos
