"""Exponential moving average of the weights, as a callback."""

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

    Each rank averages its own shard of the weights.
    """

    key = "EmaCallback"

    def __init__(self, config: EmaConfig) -> None:
        self.config = config
        self.average: ExponentialMovingAverage | None = None
        self._engine: Engine | None = None

    def on_fit_start(self, run: Run) -> None:
        """Start from the current weights."""
        self._engine = run.engine
        self.average = ExponentialMovingAverage(run.engine.weights(), self.config)

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Update the average, unless the step was skipped."""
        if self.average is not None and not result.skipped:
            self.average.update()

    def validation_weights(self, run: Run) -> AbstractContextManager[None]:
        """Validate with the averaged weights."""
        return self.swapped_in()

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run a block with the averaged weights in the model; every rank must call it."""
        if self.average is None or self._engine is None:
            yield
            return
        with self.average.average_parameters():
            self._engine.weights_changed()
            yield
        # Not reached after an error, since other ranks may never call it.
        self._engine.weights_changed()

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights and the number of updates."""
        if self.average is None or self._engine is None:
            return {}
        return self._engine.stored(self.average.shadow()) | {_UPDATES: torch.tensor(self.average.num_updates)}

    def load_tensors(self, source: TensorSource) -> None:
        """Load averaged weights."""
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
        """Start from the weights of the checkpoint."""
        if self.average is not None:
            self.average.restart()
