"""The moving average of the weights as an observer of the loop."""

from contextlib import AbstractContextManager

from torch import Tensor

from roadwork_dist.config.schema import EmaConfig
from roadwork_dist.events.callback import Callback, Run
from roadwork_dist.events.state import StepResult
from roadwork_dist.optim.ema import ExponentialMovingAverage


class EmaCallback(Callback):
    """Updates the average after each optimizer step and validates with it."""

    def __init__(self, config: EmaConfig) -> None:
        self.config = config
        self.average: ExponentialMovingAverage | None = None
        self._swap: AbstractContextManager[None] | None = None

    def on_fit_start(self, run: Run) -> None:
        """Start from the weights as they are."""
        self.average = ExponentialMovingAverage(run.model, self.config)

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """One update per step that moved the weights."""
        if self.average is not None and not result.skipped:
            self.average.update()

    def on_validation_start(self, run: Run) -> None:
        """Put the average in place of the weights."""
        if self.average is not None:
            self._swap = self.average.swapped_in()
            self._swap.__enter__()

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """Put the weights back."""
        self._put_back()

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Put the weights back where a validation was interrupted."""
        self._put_back()

    def _put_back(self) -> None:
        if self._swap is not None:
            self._swap.__exit__(None, None, None)
            self._swap = None

    def tensors(self) -> dict[str, Tensor]:
        """The shadow, for a checkpoint."""
        return self.average.state_dict() if self.average is not None else {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take a shadow over."""
        if self.average is not None:
            self.average.load_state_dict(tensors)
