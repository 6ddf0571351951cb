"""A rank whose launcher was killed saves and leaves, instead of holding its GPU and the run folder's lock.

torchrun and ``accelerate launch`` start ranks in sessions of their own and tie them to nothing: ranks
of a launcher that was killed (SIGKILL, out of memory) go on training, unseen. The kernel could signal
them (``PR_SET_PDEATHSIG``), but would have to be asked by the launcher to leave no gap, and a rank that
hangs in a collective answers no signal; a thread that looks who its parent is needs neither.
"""

import logging
import os
import threading

from roadwork_dist.events.callback import Callback, Run

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
GRACE_S = 120.0
"""An orphan that has not left by itself after so many seconds is ended."""
EXIT_ORPHAN = 70
_PARENT = os.getppid()  # as early as can be; later it may be another one already
# torchrun and accelerate's launcher for several processes; accelerate's for one.
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class LauncherWatch(Callback):
    """Asks the run to stop when its launcher is gone.

    Where no launcher has started this process, nothing is watched: a run that outlives its shell
    (``nohup``) is meant to.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()

    def on_fit_start(self, run: Run) -> None:
        """Start watching."""
        if any(name in os.environ for name in _LAUNCHED):
            self._ended = threading.Event()
            arguments = (run, self._ended)
            threading.Thread(target=_watch, args=arguments, daemon=True, name="launcher watch").start()

    def on_fit_end(self, run: Run) -> None:
        """Stop watching."""
        self._ended.set()

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Stop watching."""
        self._ended.set()


def _watch(run: Run, ended: threading.Event) -> None:
    while os.getppid() == _PARENT:
        if ended.wait(LOOK_EVERY_S):
            return
    logger.warning("the launcher (process %d) is gone: saving behind this step, then leaving", _PARENT)
    run.interrupt_requested = True
    if not ended.wait(GRACE_S):
        logger.error("no end %.0f s after the launcher's: ended; the last checkpoint is untouched", GRACE_S)
        logging.shutdown()
        os._exit(EXIT_ORPHAN)
