"""The loss of the detector: a weighted sum of parts, each a mean over the rows that have its target.

The mean is over all rows of an optimizer step, of every micro-batch and every rank. So nothing here
divides: parts are returned as sums, targets are counted apart, and whoever knows all counts forms
``total = Σ weights[part] · sums[part] / count[part]`` (0 where a count is 0).

B batch
"""

import logging

from torch import Tensor

from roadwork_dist.config.batch import UNLABELLED, WEATHER, Batch, ModelOutput
from roadwork_dist.config.experiment import LossConfig
from roadwork_dist.detector.losses.auxiliary import dice_loss_sum, weather_loss_sum
from roadwork_dist.detector.losses.consistency import consistency_loss_sum, rows_with_agreement
from roadwork_dist.detector.losses.focal import focal_loss_sum

logger = logging.getLogger(__name__)

WITH_MASKS = {"focal": 0.40, "consistency": 0.25, "weather": 0.15, "dice": 0.20}
WITHOUT_MASKS = {"focal": 0.50, "consistency": 0.30, "weather": 0.20}


class RoadworkLoss:
    """Focal, view consistency, weather, Dice and load balancing, as sums over rows with a target.

    A part of weight 0 is still computed: it is logged, and its head gets a gradient (of zero), which
    data parallel training needs.

    Args:
        config: weights and settings of the parts.
        with_masks: the model has a mask head and the training data has masks.
        with_experts: the model has a mixture of experts; adds the part ``balance``.
    """

    def __init__(self, config: LossConfig, *, with_masks: bool, with_experts: bool = False) -> None:
        self.config = config
        self.weights = part_weights(config, with_masks=with_masks, with_experts=with_experts)

    def count_targets(self, batch: Batch) -> dict[str, int]:
        """Rows of a batch that have a target, by part. Reads the batch only; cheap on the CPU."""
        labels = batch["label"]
        counts = {
            "focal": int((labels != UNLABELLED).sum()),
            "consistency": rows_with_agreement(_of_one_photo(batch["view_mask"], batch)),
            "weather": int((batch["weather"] != len(WEATHER)).sum()),
            "dice": int(batch["mask_known"].sum()) if "mask_known" in batch else 0,
            "balance": len(labels),
        }
        return {part: counts[part] for part in self.weights}

    def __call__(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        """Sums over rows with a target, by part.

        Returns:
            Scalars, float32 whatever the autocast dtype; exactly 0, attached to the graph, for a part
            without a target in this batch.
        """
        config = self.config
        sums = {
            "focal": focal_loss_sum(
                output.logits,
                batch["label"],
                batch.get("soft_label"),
                gamma=config.gamma,
                alpha=config.alpha,
                label_smoothing=config.label_smoothing,
            ),
            "consistency": consistency_loss_sum(output.view_logits, _of_one_photo(output.view_mask, batch)),
            "weather": weather_loss_sum(output.weather_logits, batch["weather"]),
        }
        if "dice" in self.weights:
            sums["dice"] = _dice(output, batch)
        if "balance" in self.weights:
            sums["balance"] = output.balance.float().sum()
        return sums


def part_weights(config: LossConfig, *, with_masks: bool, with_experts: bool) -> dict[str, float]:
    """Weight of every part; explicit weights that leave a part out give it 0."""
    weights = dict(WITH_MASKS if with_masks else WITHOUT_MASKS)
    if config.weights != "auto":
        weights = {part: float(config.weights.get(part, 0.0)) for part in weights}
        if not with_masks and config.weights.get("dice", 0.0) > 0:
            logger.warning(
                "loss.weights has dice, but there are no masks to learn from: the part is left out"
            )
    if with_experts:
        weights["balance"] = config.balance
    return weights


def _of_one_photo(view_mask: Tensor, batch: Batch) -> Tensor:
    """``view_mask`` [B, V] without the rows whose views come from two photos: those need not agree."""
    return view_mask & ~batch["views_of_two"].unsqueeze(1) if "views_of_two" in batch else view_mask


def _dice(output: ModelOutput, batch: Batch) -> Tensor:
    if output.mask_logits is None:
        return output.logits[:0].float().sum()
    if "mask" not in batch:
        # Zero rows: exactly 0, and the mask head still takes part in the backward pass.
        return output.mask_logits[:0].float().sum()
    return dice_loss_sum(output.mask_logits, batch["mask"], batch["mask_known"])
