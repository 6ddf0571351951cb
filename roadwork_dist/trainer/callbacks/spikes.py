"""Whether a loss is a spike, judged by the accepted losses before it."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

from roadwork_dist.common.errors import LossSpikeError
from roadwork_dist.trainer.config import SpikeConfig
from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import StepResult

logger = logging.getLogger(__name__)

SCALE = 1.4826
"""Makes the median absolute deviation of normal draws their standard deviation (1 / Φ⁻¹(3/4))."""


def robust_z(loss: float, before: Iterable[float]) -> float:
    """How many robust standard deviations a loss lies above the median of others.

    ``(loss - median) / (1.4826 · MAD)``, the modified z-score of Iglewicz and Hoaglin (1993). The deviation
    is at least a thousandth of the median, or the smallest step up from a run of equal losses would be one.

    Args:
        loss: finite.
        before: at least one finite loss.
    """
    losses = list(before)
    median = statistics.median(losses)
    deviation = SCALE * statistics.median(abs(each - median) for each in losses)
    return (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12)


class SpikeJudge:
    """Remembers accepted losses and tells spikes from them.

    Args:
        window: how many accepted steps a loss is compared with; before so many there is no spike.
        threshold: robust standard deviations above their median that are one.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self.threshold = threshold
        self._losses: deque[float] = deque(maxlen=window)

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is one; a loss that is not finite is none (it is refused anyway)."""
        if len(self._losses) < (self._losses.maxlen or 0) or not math.isfinite(loss):
            return False
        return self.height(loss) > self.threshold

    def height(self, loss: float) -> float:
        """Robust standard deviations above the median."""
        return robust_z(loss, self._losses)

    def accept(self, loss: float) -> None:
        """Remember the loss of a step that was taken."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def state_dict(self) -> dict[str, list[float]]:
        """JSON-able state; floats survive JSON exactly."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a :meth:`state_dict` over; of a longer window the newest stay."""
        self._losses.clear()
        self._losses.extend(state.get("losses", []))


class SpikeGuard(Callback):
    """Acts on spikes of the loss; with ``off`` it finds none.

    The loss is that of all ranks and known before the gradients are, so all ranks find the same and a
    spike never moves the weights. ``rewind`` is what PaLM's training did (arXiv 2204.02311, §5.1): weights,
    moments and averages go back to the last checkpoint, and the rows since then are passed over; counters of
    steps and rows go on, and so does the learning rate. A run that is killed and replays those rows meets
    the same spike and does the same.
    """

    key = "SpikeGuard"

    def __init__(self, config: SpikeConfig, most_in_a_row: int) -> None:
        self.config, self.most_in_a_row = config, most_in_a_row
        self.judge = SpikeJudge(config.window, config.threshold)
        self._streak = 0
        self._is_spike = False

    def vetoes(self, run: Run, loss: float) -> bool:
        """Whether the loss is a spike."""
        self._is_spike = self.config.action != "off" and self.judge.is_spike(loss)
        return self._is_spike

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Remember an accepted loss; act on a spike.

        Raises:
            LossSpikeError: ``action`` is ``stop``, or too many spikes came in a row; on every rank.
        """
        if self.config.action == "off":
            return
        is_spike, self._is_spike = self._is_spike, False
        if not is_spike:
            self._streak = 0
            if not result.skipped:
                self.judge.accept(result.loss)
            return
        self._streak += 1
        height = self.judge.height(result.loss)
        run.tell("spike", {"loss": result.loss, "height": height, "action": self.config.action})
        text = (
            f"the loss of step {run.state.step} is {result.loss:.4g}, {height:.1f} robust standard "
            f"deviations above the last {self.config.window} (spike.threshold {self.config.threshold:g})"
        )
        if self.config.action == "stop" or self._streak >= self.most_in_a_row:
            raise LossSpikeError(
                f"{text}, {self._streak} in a row: lower optim.lr or optim.clip, look at those rows, or "
                "raise spike.threshold; the last checkpoint is untouched"
            )
        logger.warning("%s: step not taken%s", text, ", going back" * (self.config.action == "rewind"))
        if self.config.action == "rewind":
            run.rewind()

    def state_dict(self) -> dict[str, Any]:
        """Accepted losses and spikes in a row."""
        return {**self.judge.state_dict(), "streak": self._streak} if self.config.action != "off" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a :meth:`state_dict` over."""
        self.judge.load_state_dict(state)
        self._streak = state.get("streak", 0)
