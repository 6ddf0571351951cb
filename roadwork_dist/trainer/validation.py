"""What a validation says about the run: whether its figure is the best so far, and what was wrong with it."""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.trainer.answers import PassResult
from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import TrainState
from roadwork_dist.trainer.feed.dataset import MapDataset, sample_id

logger = logging.getLogger(__name__)

NAMED = 8
"""Rows that a warning names."""


def weights_to_validate(run: Run, callbacks: Sequence[Callback]) -> AbstractContextManager[None]:
    """A block with the weights that a callback puts in place; with the model's own where none does.

    Raises:
        ConfigError: several callbacks give weights.
    """
    found = {callback: callback.validation_weights(run) for callback in callbacks}
    offered = {callback: weights for callback, weights in found.items() if weights is not None}
    if len(offered) > 1:
        raise ConfigError(
            f"{' and '.join(type(callback).__name__ for callback in offered)} give weights to validate with, "
            "expected one that does: leave the others out (ema.enabled: false for the average)"
        )
    return next(iter(offered.values()), nullcontext())


def observe(state: TrainState, outcome: PassResult, data: MapDataset, monitor: str) -> bool:
    """Take the monitored figure of a validation in; True if it is the best so far.

    Args:
        state: of the run.
        outcome: of the validation.
        data: its data set, to name rows.
        monitor: the figure; higher is better, unless it starts with ``-``.
    """
    bad = outcome.not_finite
    if bad:
        logger.warning(
            "%d of %d validation rows have answers that are not finite, so the figures are NaN: %s%s",
            len(bad),
            len(data),
            ", ".join(sample_id(data, row) for row in bad[:NAMED]),
            ", …" if len(bad) > NAMED else "",
        )
    figure = -outcome.metrics[monitor[1:]] if monitor.startswith("-") else outcome.metrics[monitor]
    if math.isnan(figure):
        logger.warning(
            "%s of the validation at step %d is not a number, so it cannot choose the best weights",
            monitor,
            state.step,
        )
    return state.observe(figure)
