"""The moving average of the weights as a callback."""

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

    key = "EmaCallback"

    def __init__(self, config: EmaConfig) -> None:
        self.config = config
        self.average: ExponentialMovingAverage | None = None
        self._engine: Engine | None = None

    def on_fit_start(self, run: Run) -> None:
        """Start from the weights as they are."""
        self._engine = run.engine
        self.average = ExponentialMovingAverage(run.engine.weights(), self.config)

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """One update per step that moved the weights."""
        if self.average is not None and not result.skipped:
            self.average.update()

    def validation_weights(self, run: Run) -> AbstractContextManager[None]:
        """A block with the average in place of the weights."""
        return self.swapped_in()

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run a block with the average in place of the weights; all ranks do."""
        if self.average is None or self._engine is None:
            yield
            return
        with self.average.average_parameters():
            self._engine.weights_changed()
            yield
        # Not reached after an error, since other ranks may never call it.
        self._engine.weights_changed()

    def tensors(self) -> dict[str, Tensor]:
        """The shadow, for a checkpoint."""
        if self.average is None or self._engine is None:
            return {}
        return self._engine.stored(self.average.shadow()) | {_UPDATES: torch.tensor(self.average.num_updates)}

    def load_tensors(self, source: TensorSource) -> None:
        """Take a shadow over."""
        if self.average is None or self._engine is None:
            return
        if _UPDATES not in source.shapes:
            self.on_no_tensors()
            return
        updates = torch.tensor(0)
        self._engine.fill(self.average.shadow(), source, "")
        source.read({_UPDATES: updates})
        self.average.num_updates = int(updates)

    def on_no_tensors(self) -> None:
        """Start from the weights that the checkpoint brought."""
        if self.average is not None:
            self.average.restart()
