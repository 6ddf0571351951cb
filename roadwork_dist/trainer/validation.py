"""What a validation says about the run: whether its figure is the best so far, and what was wrong with it."""

import logging
import math

from roadwork_dist.trainer.answers import PassResult
from roadwork_dist.trainer.events.state import TrainState
from roadwork_dist.trainer.feed.dataset import MapDataset, sample_id

logger = logging.getLogger(__name__)

NAMED = 8
"""Rows that a warning names."""


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
