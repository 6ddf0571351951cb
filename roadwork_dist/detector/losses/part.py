"""Base class of the parts of the loss, and their registry.

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

    The sum is divided later by the number of such rows in the whole optimizer step, so parts must not divide.

    Args:
        config: settings of the loss.

    Attributes:
        auto: weight without and with masks if ``loss.weights`` is ``auto``; None = the part is computed
            only if ``loss.weights`` names it.
    """

    auto: ClassVar[tuple[float, float] | None] = None

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    @classmethod
    def weight(cls, name: str, config: LossConfig, outputs: Outputs) -> float | None:
        """Weight of the part; None = it is not computed.

        If ``loss.weights`` is given but omits a part that has an ``auto`` weight, its weight is 0: it is
        still computed and logged, and its head gets a zero gradient, which data-parallel training needs.
        """
        if config.weights == "auto":
            return None if cls.auto is None else cls.auto[outputs.masks]
        left_out = None if cls.auto is None else 0.0
        return config.weights.get(name, left_out)

    @abstractmethod
    def count(self, batch: Batch) -> int:
        """Rows of the batch that have a target. Reads only the batch; cheap on the CPU."""

    @abstractmethod
    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Sum over those rows.

        Returns:
            Scalar float32 for any autocast dtype; exactly 0, attached to the graph, if there are none.
        """


PARTS: Registry[type[LossPart]] = Registry("part of the loss")


def rows_of_one_photo(view_mask: Tensor, batch: Batch) -> Tensor:
    """``view_mask`` [B, V], False in rows whose views come from two photos, since those need not agree."""
    return view_mask & ~batch["views_of_two"].unsqueeze(1) if "views_of_two" in batch else view_mask
