"""The state of the training loop, and the result of one optimizer step."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    """The complete loop state besides weights: what a checkpoint needs for an exact resume.

    Attributes:
        step: optimizer steps taken, including skipped ones.
        epoch: completed passes over the data, including their validation.
        step_in_epoch: optimizer steps taken in the current epoch.
        best: best validation figure so far; None before the first validation.
        best_step: step of that validation.
        stale_validations: validations since then.
        nonfinite_streak: steps skipped in a row.
        should_stop: leave the loop at the next boundary; every rank holds the same value.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: float | None = None
    best_step: int = 0
    stale_validations: int = 0
    nonfinite_streak: int = 0
    should_stop: bool = False

    def observe(self, figure: float) -> bool:
        """Record a validation figure (higher is better); True if it is the best so far."""
        improved = not math.isnan(figure) and (self.best is None or figure > self.best)
        if improved:
            self.best, self.best_step, self.stale_validations = figure, self.step, 0
        else:
            self.stale_validations += 1
        return improved

    def state_dict(self) -> dict[str, Any]:
        """JSON-serializable fields."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the fields.

        Raises:
            KeyError: a field is missing.
        """
        for item in fields(self):
            setattr(self, item.name, state[item.name])


@dataclass(frozen=True)
class StepResult:
    """One optimizer step; figures are over the rows of all ranks unless stated otherwise.

    Attributes:
        loss: weighted sum of the parts.
        parts: mean of each part over the rows that have a target; parts without such rows are absent.
        grad_norm: global norm before clipping.
        lr: learning rate of the step.
        rows: rows of the step over all ranks.
        seconds: wall time of the step, including waiting for data (this rank).
        data_wait: share of ``seconds`` spent waiting for data (this rank).
        work_s: seconds from the start of the forward passes until this rank's last gradient was ready,
            before it waits for the other ranks; 0 = not known.
        operations: floating-point operations of the backbone in the step (this rank); 0 = not known.
        skipped: the weights did not change, because the loss or gradient was not finite or was vetoed.
        bad_rows: data set rows of the micro-batches whose loss was not finite, of all ranks.
        interrupted: some rank was asked to stop; the same on all ranks.
        vetoed: skipped because a callback vetoed the finite loss; the same on all ranks.
    """

    loss: float
    parts: dict[str, float]
    grad_norm: float
    lr: float
    rows: int
    seconds: float = 0.0
    data_wait: float = 0.0
    work_s: float = 0.0
    operations: float = 0.0
    skipped: bool = False
    bad_rows: list[int] = field(default_factory=list)
    interrupted: bool = False
    vetoed: bool = False
