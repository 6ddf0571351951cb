"""A process whose launcher was killed does not go on unseen.

torchrun and ``accelerate launch`` start ranks in sessions of their own and tie them to nothing: ranks
of a launcher that was killed (SIGKILL, out of memory) go on, with their GPUs and the run folder's lock,
or wait minutes for a meeting that never comes. The kernel could signal them (``PR_SET_PDEATHSIG``), but
the launcher would have to ask for it to leave no gap, and a process that hangs in a collective answers
no signal; a thread that looks who its parent is needs neither.
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
"""A process that was asked to leave and is still there so many seconds later is ended."""
EXIT_ORPHAN = 70
"""EX_SOFTWARE of sysexits.h, as for a hang."""
# torchrun and accelerate's launcher for several processes; accelerate's for one.
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
_LAUNCHERS = (b"python", b"torchrun", b"accelerate", b"deepspeed")

_watches: list[threading.Thread] = []
_to_ask: list[Callable[[], None]] = []
_ended = threading.Event()


def watch_launcher() -> None:
    """End this process when its launcher is gone; called again it changes nothing.

    Where no launcher has started it, nothing is watched: what outlives its shell (``nohup``) is meant to.
    """
    if not _watches and any(name in os.environ for name in _LAUNCHED):
        _watches.append(
            threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="launcher watch")
        )
        _watches[0].start()
        atexit.register(_stop_watching)


@contextmanager
def asked_first(ask: Callable[[], None]) -> Iterator[None]:
    """A block in which the process is not ended at once: ``ask`` is called, and it may leave in time."""
    _to_ask.append(ask)
    try:
        yield
    finally:
        _to_ask.remove(ask)


def _stop_watching() -> None:
    """A thread that runs while Python ends may be torn out of a library, which then aborts the process."""
    _ended.set()
    _watches[0].join(LOOK_EVERY_S)


def _watch(parent: int) -> None:
    while not _is_orphan(parent):
        if _ended.wait(LOOK_EVERY_S):
            return
    asks = list(_to_ask)
    what = "saving, then leaving" if asks else "leaving"
    logger.warning("the launcher (process %d) is gone: %s", parent, what)
    for ask in asks:
        ask()
    if asks:
        time.sleep(GRACE_S)
        logger.error("still here %.0f s behind the launcher's end: ended", GRACE_S)
    logging.shutdown()
    os._exit(EXIT_ORPHAN)


def _is_orphan(parent: int) -> bool:
    """Whether the launcher has died, also before the first look: process 1 takes orphans, but starts none.

    It may be a launcher itself, in a container.
    """
    if os.getppid() != parent:
        return True
    try:
        return parent == 1 and not any(name in Path("/proc/1/cmdline").read_bytes() for name in _LAUNCHERS)
    except OSError:  # no /proc
        return False
