"""Reports steps whose loss or gradient is not finite, and ends the run after too many in a row."""

import logging

from roadwork_dist.common.errors import NonFiniteLossError
from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import StepResult

logger = logging.getLogger(__name__)


class NonFiniteGuard(Callback):
    """Logs the samples of skipped steps, and ends a run that skips too many in a row.

    Args:
        most_in_a_row: skipped steps in a row after which the run ends.
    """

    def __init__(self, most_in_a_row: int) -> None:
        self.most_in_a_row = most_in_a_row

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Handle a step that was skipped but not vetoed.

        Raises:
            NonFiniteLossError: too many in a row; on every rank.
        """
        if not result.skipped or result.vetoed:
            return
        ids = ", ".join(run.sample_ids(result.bad_rows[:8]))
        logger.warning(
            "step %d skipped on all ranks: loss %s, gradient norm %s%s",
            run.state.step,
            result.loss,
            result.grad_norm,
            f", samples {ids}" if ids else "",
        )
        if run.state.nonfinite_streak >= self.most_in_a_row:
            raise NonFiniteLossError(
                f"the loss or its gradient was not finite in {run.state.nonfinite_streak} steps in a row "
                f"(up to step {run.state.step}; last samples: {ids or 'unknown'}): lower optim.lr, check "
                "those samples, or raise max_nonfinite_steps; the last good checkpoint is untouched"
            )
