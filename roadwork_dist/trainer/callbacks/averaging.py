"""The moving average of the weights as an observer of the loop."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from roadwork_dist.trainer.config import EmaConfig
from roadwork_dist.trainer.engine.base import Engine, TensorSource
from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import StepResult
from roadwork_dist.trainer.optim.ema import ExponentialMovingAverage

_UPDATES = "__updates__"


class EmaCallback(Callback):
    """Updates the average after each optimizer step and validates with it.

    Each rank averages the part of the weights that it holds.
    """

    def __init__(self, config: EmaConfig) -> None:
        self.config = config
        self.average: ExponentialMovingAverage | None = None
        self._engine: Engine | None = None
        self._swap: AbstractContextManager[None] | None = None

    def on_fit_start(self, run: Run) -> None:
        """Start from the weights as they are."""
        self._engine = run.engine
        self.average = ExponentialMovingAverage(run.engine.weights(), self.config)

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """One update per step that moved the weights."""
        if self.average is not None and not result.skipped:
            self.average.update()

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run a block with the average in place of the weights; all ranks do."""
        if self.average is None or self._engine is None:
            yield
            return
        with self.average.swapped_in():
            self._engine.weights_changed()
            yield
        # Not reached by an error, behind which other ranks may never call it.
        self._engine.weights_changed()

    def on_validation_start(self, run: Run) -> None:
        """Put the average in place of the weights."""
        self._swap = self.swapped_in()
        self._swap.__enter__()

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """Put the weights back."""
        self._swap_back()

    def on_validation_interrupted(self, run: Run) -> None:
        """Put the weights back, before they are saved."""
        self._swap_back()

    def _swap_back(self) -> None:
        if self._swap is not None:
            self._swap.__exit__(None, None, None)
            self._swap = None

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Put the weights back where a validation was interrupted."""
        swap, self._swap = self._swap, None
        if swap is not None:
            swap.__exit__(type(error), error, error.__traceback__)

    def tensors(self) -> dict[str, Tensor]:
        """The shadow, for a checkpoint."""
        if self.average is None or self._engine is None:
            return {}
        return self._engine.stored(self.average.shadow()) | {_UPDATES: torch.tensor(self.average.updates)}

    def load_tensors(self, source: TensorSource) -> None:
        """Take a shadow over; where the checkpoint has none, start from the weights it brought."""
        if self.average is None or self._engine is None:
            return
        if _UPDATES not in source.shapes:
            self.average.restart()
            return
        updates = torch.tensor(0)
        self._engine.fill(self.average.shadow(), source, "")
        source.read({_UPDATES: updates})
        self.average.updates = int(updates)
