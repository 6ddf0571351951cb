"""The loss of the detector: a weighted sum of parts, each a mean over the rows that have its target.

The mean is over all rows of an optimizer step, across micro-batches and ranks. So nothing is divided here:
parts are returned as sums, targets are counted separately, and the trainer, which knows all counts, computes
``total = Σ weights[part] · sums[part] / count[part]`` (0 where a count is 0).
"""

from torch import Tensor

from roadwork_dist.config.batch import Batch, ModelOutput
from roadwork_dist.config.experiment import LossConfig
from roadwork_dist.detector.losses.part import PARTS, Outputs


class RoadworkLoss:
    """The active parts of the loss, as sums over rows with a target.

    Args:
        config: weights and settings of the parts.
        with_masks: the model has a mask head and the training data has masks.
        with_experts: the model has a mixture of experts.

    Raises:
        ConfigError: ``loss.weights`` names a part that is not registered.
    """

    def __init__(self, config: LossConfig, *, with_masks: bool, with_experts: bool = False) -> None:
        check_part_names(config)
        outputs = Outputs(masks=with_masks, experts=with_experts)
        weights = {name: PARTS[name].weight(name, config, outputs) for name in PARTS}
        self.weights = {name: float(weight) for name, weight in weights.items() if weight is not None}
        self.parts = {name: PARTS[name](config) for name in self.weights}

    def count_targets(self, batch: Batch) -> dict[str, int]:
        """Rows of a batch that have a target, by part."""
        return {name: part.count(batch) for name, part in self.parts.items()}

    def __call__(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """Sums over rows with a target, by part; see :meth:`LossPart.__call__`."""
        return {name: part(output, batch) for name, part in self.parts.items()}


def check_part_names(config: LossConfig) -> None:
    """Refuse weights of parts that are not registered.

    Raises:
        ConfigError: a part is not registered; the message names the nearest one.
    """
    for name in () if config.weights == "auto" else config.weights:
        _ = PARTS[name]
