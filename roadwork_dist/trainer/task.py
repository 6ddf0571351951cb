"""What is learned: from a batch to sums of losses, and from predictions to figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.common.errors import DataError
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
        """Rows of the batch.

        Raises:
            DataError: the batch is not inputs and labels.
        """
        if not isinstance(batch, tuple | list) or len(batch) < 2:  # a task that inherits this may have more
            raise _wrong_batch(batch)
        return {"cross_entropy": len(batch[1])}

    def __call__(self, forward: Callable[..., Any], batch: tuple[Tensor, Tensor]) -> TaskOutput:
        """Logits and their summed cross-entropy.

        Raises:
            DataError: the batch or the model's output is of another kind; says what came.
        """
        inputs, labels = _inputs_and_labels(batch)
        logits = _logits(forward(inputs), labels)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return TaskOutput({"cross_entropy": loss}, {"logits": logits, "label": labels})

    def metrics(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        """MCC (Gorodkin 2004 for K > 2) and accuracy of the most likely class."""
        return mcc_accuracy(rows["label"].numpy(), rows["logits"].float().numpy())


_OWN_TASK = "or give the Trainer a task of your own (roadwork_dist.trainer.task.Task)"


def _wrong_batch(batch: Any) -> DataError:
    keys = f" with the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
    size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
    return DataError(
        f"a batch is a {type(batch).__name__}{size}{keys}, expected (inputs, labels): let the data set "
        f"return such pairs, {_OWN_TASK}"
    )


def _inputs_and_labels(batch: Any) -> tuple[Any, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise _wrong_batch(batch)
    inputs, labels = batch
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in _WHOLE:
        got = f"a {type(labels).__name__}"
        if isinstance(labels, Tensor):
            got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        raise DataError(
            f"labels are {got}, expected int64 [batch], the number of each row's class: let the data set "
            f"return a whole number a row, {_OWN_TASK}"
        )
    if labels.device.type == "cpu" and len(labels) and int(labels.min()) < 0:
        raise DataError(
            f"a label is {int(labels.min())}, expected the number of a class, from 0: leave rows without a "
            f"label out, {_OWN_TASK}"
        )
    return inputs, labels.long()


_WHOLE = {torch.int64, torch.int32, torch.int16, torch.uint8}


def _logits(output: Any, labels: Tensor) -> Tensor:
    if (
        not isinstance(output, Tensor)
        or output.ndim != 2
        or len(output) != len(labels)
        or output.shape[1] < 2
    ):
        got = f"a {type(output).__name__}"
        if isinstance(output, Tensor):
            got = f"a tensor {list(output.shape)}"
        raise DataError(
            f"the model returned {got} for {len(labels)} rows, expected logits [{len(labels)}, classes] of "
            f"two classes or more: return those, {_OWN_TASK}"
        )
    if labels.device.type == "cpu" and int(labels.max()) >= output.shape[1]:
        raise DataError(
            f"a label is {int(labels.max())}, but the model tells {output.shape[1]} classes, 0 to "
            f"{output.shape[1] - 1}: give it as many outputs as there are classes, {_OWN_TASK}"
        )
    return output.float()
