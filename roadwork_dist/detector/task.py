"""The training task of the roadwork detector: loss and validation figures for batches of photos."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from roadwork_dist.config.batch import UNLABELLED, Batch, ModelOutput
from roadwork_dist.detector.losses.composite import RoadworkLoss
from roadwork_dist.metrics.classification import mcc_accuracy
from roadwork_dist.photos.augment.batched import with_augmented_views
from roadwork_dist.trainer.task import TaskOutput


class RoadworkTask:
    """The composite loss of the detector's outputs; validation figures are MCC and accuracy.

    Args:
        loss: the composite loss.
        operations_per_view: floating-point operations of the backbone per training view, forward and
            backward; 0 = not known.
    """

    figures = ("mcc", "accuracy")

    def __init__(self, loss: RoadworkLoss, operations_per_view: float = 0.0) -> None:
        self.loss = loss
        self.operations_per_view = operations_per_view
        self.weights: Mapping[str, float] = loss.weights

    def count(self, batch: Batch) -> dict[str, int]:
        """Rows with a target, per part."""
        return self.loss.count_targets(batch)

    def operations(self, batch: Batch) -> float:
        """Operations of the backbone for the real views of a batch; 0 if the batch contains features."""
        if not self.operations_per_view or "views" not in batch:
            return 0.0
        return self.operations_per_view * int(batch["view_mask"].sum())

    def __call__(self, forward: Callable[..., Any], batch: Batch) -> TaskOutput:
        """Sums of the parts; rows hold ``index``, ``label``, ``logits`` [B, K] and ``view_gates`` [B, V]."""
        batch = with_augmented_views(batch)
        output: ModelOutput = forward(batch)
        rows = {
            "index": batch["index"],
            "label": batch["label"],
            "logits": output.logits,
            "view_gates": _pad_views(output.view_gates),
        }
        return TaskOutput(self.loss(output, batch), rows)

    def metrics(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        """MCC and accuracy at probability 0.5 over the labelled rows; NaN if there are none."""
        labelled = rows["label"] != UNLABELLED
        if not bool(labelled.any()):
            return dict.fromkeys(self.figures, math.nan)
        return mcc_accuracy(rows["label"][labelled].numpy(), rows["logits"][labelled].float().numpy())


MOST_VIEWS = 128
"""Width that gates are padded to (NaN = no such view), so that batches with different V can be joined."""


def _pad_views(gates: Tensor) -> Tensor:
    return nn.functional.pad(gates, (0, MOST_VIEWS - gates.shape[1]), value=math.nan)
