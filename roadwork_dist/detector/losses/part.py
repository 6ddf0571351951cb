"""What a part of the loss is, and the registry of parts.

B batch
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from roadwork_dist.common.registry import Registry
from roadwork_dist.config.batch import Batch, ModelOutput
from roadwork_dist.config.experiment import LossConfig


class Outputs(NamedTuple):
    """Which optional outputs the model has."""

    masks: bool
    """A mask head, and training data with masks."""
    experts: bool
    """A mixture of experts."""


class LossPart(ABC):
    """One part of the loss: a sum over the rows that have its target.

    The loss divides by the number of such rows in the whole optimizer step, so no part divides by it.

    Args:
        config: settings of the loss.

    Attributes:
        auto: weight without and with masks where ``loss.weights`` is ``auto``; None = the part is computed
            only where ``loss.weights`` names it.
    """

    auto: ClassVar[tuple[float, float] | None] = None

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    @classmethod
    def weight(cls, name: str, config: LossConfig, outputs: Outputs) -> float | None:
        """Weight of the part; None = it is not computed.

        Where weights are given, a part of ``auto`` that is not among them weighs 0: it is computed and
        logged, and its head gets a gradient (of zero), which data parallel training needs.
        """
        if config.weights == "auto":
            return None if cls.auto is None else cls.auto[outputs.masks]
        left_out = None if cls.auto is None else 0.0
        return config.weights.get(name, left_out)

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """Rows of the batch that have a target. Reads the batch only; cheap on the CPU."""

    @abstractmethod
    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Sum over those rows.

        Returns:
            Scalar float32 whatever the autocast dtype; exactly 0, attached to the graph, if there are none.
        """


PARTS: Registry[type[LossPart]] = Registry("part of the loss")


def rows_of_one_photo(view_mask: Tensor, batch: Batch) -> Tensor:
    """``view_mask`` [B, V] without the rows whose views come from two photos: those need not agree."""
    return view_mask & ~batch["views_of_two"].unsqueeze(1) if "views_of_two" in batch else view_mask
