"""Ends a rank whose launcher was killed.

torchrun and ``accelerate launch`` start ranks in their own sessions, independent of the launcher's. If the
launcher is killed (SIGKILL, out of memory), its ranks keep running and hold their GPUs and the run folder's
lock, or wait minutes for a rendezvous that never happens. The kernel could signal them
(``PR_SET_PDEATHSIG``), but only the launcher could request that without a gap, and a process that hangs in a
collective handles no signal. A thread that checks its parent process has neither problem.
"""

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
GRACE_S = 120.0
"""A process that is still running this long after it was asked to leave is ended."""
EXIT_ORPHAN = 70
"""EX_SOFTWARE of sysexits.h, as for a hang."""
# Set by torchrun and by accelerate's launcher for several processes; by accelerate's for one process.
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
_LAUNCHERS = (b"python", b"torchrun", b"accelerate", b"deepspeed")

_watches: list[threading.Thread] = []
_to_ask: list[Callable[[], None]] = []
_ended = threading.Event()


def watch_launcher() -> None:
    """End this process when its launcher is gone; further calls do nothing.

    A process without a launcher is not watched: if it outlives its shell (``nohup``), it is meant to.
    """
    if not _watches and any(name in os.environ for name in _LAUNCHED):
        _watches.append(
            threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="launcher watch")
        )
        _watches[0].start()
        atexit.register(_stop_watching)


@contextmanager
def asked_first(ask: Callable[[], None]) -> Iterator[None]:
    """Context in which the process is not ended at once: ``ask`` is called, and it has time to leave."""
    _to_ask.append(ask)
    try:
        yield
    finally:
        _to_ask.remove(ask)


def _stop_watching() -> None:
    """Stop the thread before Python shuts down: if killed inside a library, it would abort the process."""
    _ended.set()
    _watches[0].join(LOOK_EVERY_S)


def _watch(parent: int) -> None:
    while not _is_orphan(parent):
        if _ended.wait(LOOK_EVERY_S):
            return
    asks = list(_to_ask)
    what = "saving, then exiting" if asks else "exiting"
    logger.warning("the launcher (process %d) is gone: %s", parent, what)
    for ask in asks:
        ask()
    if asks:
        time.sleep(GRACE_S)
        logger.error("still running %.0f s after the launcher's end: exiting now", GRACE_S)
    logging.shutdown()
    os._exit(EXIT_ORPHAN)


def _is_orphan(parent: int) -> bool:
    """Whether the launcher has died, possibly before the first check.

    Process 1 adopts orphans but starts no ranks, unless it is itself the launcher (in a container).
    """
    if os.getppid() != parent:
        return True
    try:
        return parent == 1 and not any(name in Path("/proc/1/cmdline").read_bytes() for name in _LAUNCHERS)
    except OSError:  # no /proc
        return False
