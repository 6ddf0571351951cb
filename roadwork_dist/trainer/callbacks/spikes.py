"""Detects loss spikes against the recently accepted losses, and skips, rewinds or stops on them."""

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
"""Scales the median absolute deviation of normal draws to their standard deviation (1 / Φ⁻¹(3/4))."""


def robust_z(loss: float, before: Iterable[float]) -> float:
    """How many robust standard deviations a loss is above the median of earlier losses.

    ``(loss - median) / (1.4826 · MAD)``, the modified z-score of Iglewicz and Hoaglin (1993). The deviation
    is at least a thousandth of the median; else the smallest increase after equal losses would be a spike.

    Args:
        loss: finite.
        before: at least one finite loss.
    """
    losses = list(before)
    median = statistics.median(losses)
    deviation = SCALE * statistics.median(abs(each - median) for each in losses)
    return (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12)


class SpikeJudge:
    """Detects spikes against the last accepted losses.

    Args:
        window: number of accepted steps that a loss is compared with; until then nothing is a spike.
        threshold: robust standard deviations above their median from which a loss is a spike.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self.threshold = threshold
        self._losses: deque[float] = deque(maxlen=window)

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is a spike; a non-finite loss is not (its step is skipped anyway)."""
        if len(self._losses) < (self._losses.maxlen or 0) or not math.isfinite(loss):
            return False
        return self.height(loss) > self.threshold

    def height(self, loss: float) -> float:
        """Robust standard deviations above the median."""
        return robust_z(loss, self._losses)

    def accept(self, loss: float) -> None:
        """Add the loss of a step that was taken."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def state_dict(self) -> dict[str, list[float]]:
        """JSON-serializable state; JSON preserves floats exactly."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`; of a longer window, the newest losses are kept."""
        self._losses.clear()
        self._losses.extend(state.get("losses", []))


class SpikeGuard(Callback):
    """Handles loss spikes; with ``off`` it detects none.

    The loss is that of all ranks and is known before the backward pass, so all ranks detect the same spike
    and it never changes the weights. ``rewind`` is what PaLM's training did (arXiv 2204.02311, §5.1):
    weights, moments and averages return to the last checkpoint, and the rows since then are skipped. The
    step and row counters and the learning rate schedule continue. A run that is killed and replays those
    rows detects the same spike and does the same.
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
        """Add an accepted loss, or handle a spike.

        Raises:
            LossSpikeError: ``action`` is ``stop``, or too many spikes in a row; on every rank.
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
        logger.warning("%s: step skipped%s", text, ", rewinding" * (self.config.action == "rewind"))
        if self.config.action == "rewind":
            run.rewind()

    def state_dict(self) -> dict[str, Any]:
        """Accepted losses and the number of spikes in a row."""
        return {**self.judge.state_dict(), "streak": self._streak} if self.config.action != "off" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a :meth:`state_dict`."""
        self.judge.load_state_dict(state)
        self._streak = state.get("streak", 0)
