"""Load-balancing loss of the mixture of experts."""

from torch import Tensor

from roadwork_dist.config.batch import Batch, ModelOutput
from roadwork_dist.config.experiment import LossConfig
from roadwork_dist.detector.losses.part import PARTS, LossPart, Outputs


@PARTS.register("balance")
class BalancePart(LossPart):
    """Over all rows, with weight ``loss.balance``; computed only if the model has experts."""

    @classmethod
    def weight(cls, name: str, config: LossConfig, outputs: Outputs) -> float | None:
        """``loss.balance``, unless ``loss.weights`` names the part."""
        if not outputs.experts:
            return None
        return config.balance if config.weights == "auto" else config.weights.get(name, config.balance)

    def count(self, batch: Batch) -> int:
        """All rows."""
        return len(batch["label"])

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """Sum of the load-balancing loss over all rows."""
        return output.balance.float().sum()
