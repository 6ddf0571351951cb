"""Lets a run whose launcher was killed save a checkpoint before it ends."""

from contextlib import ExitStack

from roadwork_dist.trainer.engine.launcher import asked_first
from roadwork_dist.trainer.events.callback import Callback, Run


class LauncherWatch(Callback):
    """Asks the run to stop when its launcher is gone; see :mod:`~roadwork_dist.trainer.engine.launcher`."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def on_fit_start(self, run: Run) -> None:
        """Request a stop from now on when the launcher dies."""

        def ask() -> None:
            run.interrupt_requested = True

        self._stack.enter_context(asked_first(ask))

    def on_fit_end(self, run: Run) -> None:
        """Stop watching; nothing is saved after training."""
        self._stack.close()

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Stop watching; nothing is saved after training."""
        self._stack.close()
