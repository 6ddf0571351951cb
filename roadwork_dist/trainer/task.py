"""What is learned: from a batch to sums of losses, and from predictions to figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.metrics.classification import mcc_accuracy


@dataclass(frozen=True)
class TaskOutput:
    """What a task makes of one micro-batch.

    Attributes:
        sums: per loss part, the sum over the rows that have a target; float32 scalars on the graph,
            exactly 0 for a part without targets.
        rows: per-row tensors [B, …] that validation figures are computed from.
    """

    sums: dict[str, Tensor]
    rows: dict[str, Tensor]


class Task(Protocol):
    """Model + loss. The loop knows neither.

    The loss of an optimizer step is ``sum over parts of weight * sum / count`` with sums and counts
    over all micro-batches of all ranks, so no task divides by anything.
    """

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each part of the loss."""

    @property
    def figures(self) -> Sequence[str]:
        """Names of the figures that :meth:`metrics` gives."""

    def count(self, batch: Any) -> Mapping[str, int]:
        """Rows that have a target, per part, from the batch alone (it is on the CPU)."""

    def __call__(self, forward: Callable[..., Any], batch: Any) -> TaskOutput:
        """Run the model's forward pass on a batch that lies on its device."""

    def metrics(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        """Validation figures from every row of the data set, each once."""


def operations_of(task: Task, batch: Any) -> float:
    """Floating-point operations of the backbone for a batch, forward and backward.

    A task that knows them says so with a method ``operations(batch) -> float``; else 0 = not known.
    """
    operations: Callable[[Any], float] | None = getattr(task, "operations", None)
    return 0.0 if operations is None else operations(batch)


class ClassificationTask:
    """Cross-entropy over ``(inputs, labels)`` batches; figures are MCC and accuracy.

    Inputs are [B, …], whatever the model turns into logits [B, K]; labels are [B] int64.
    """

    weights: Mapping[str, float] = {"cross_entropy": 1.0}
    figures = ("mcc", "accuracy")

    def count(self, batch: tuple[Tensor, Tensor]) -> dict[str, int]:
        """Rows of the batch."""
        return {"cross_entropy": len(batch[1])}

    def __call__(self, forward: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> TaskOutput:
        """Logits and their summed cross-entropy."""
        inputs, labels = batch
        logits = forward(inputs).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return TaskOutput({"cross_entropy": loss}, {"logits": logits, "label": labels})

    def metrics(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        """MCC (Gorodkin 2004 for K > 2) and accuracy of the most likely class."""
        return mcc_accuracy(rows["label"].numpy(), rows["logits"].float().numpy())
