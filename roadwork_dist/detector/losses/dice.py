"""Dice loss of the mask head: where the roadwork is.

B batch · M mask classes (6)
"""

import logging

import torch
from torch import Tensor

from roadwork_dist.config.batch import Batch, ModelOutput
from roadwork_dist.config.experiment import LossConfig
from roadwork_dist.detector.losses.part import PARTS, LossPart, Outputs

logger = logging.getLogger(__name__)


def dice_loss_sum(logits: Tensor, masks: Tensor, known: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Sum over rows with a mask of the Dice loss, a mean over the mask classes.

    1 - (2 Σ p·g + s) / (Σ p + Σ g + s) per class (arXiv 1707.03237, with s added so that the loss is 0 for a
    class that is absent from both photo and prediction). The naive loop::

        total = 0.0
        for row, mask, has_mask in zip(logits, masks, known):
            if not has_mask:
                continue
            for channel, truth in zip(row, mask):
                p = sigmoid(channel)
                overlap, area = (p * truth).sum(), p.sum() + truth.sum()
                total += (1 - (2 * overlap + smooth) / (area + smooth)) / len(mask)

    Args:
        logits: [B, M, side, side], any floating dtype; computed in float32.
        masks: [B, M, side, side] in [0, 1].
        known: [B] bool, rows that have a mask.
        smooth: s, in cells.

    Returns:
        Scalar float32; 0, attached to the graph, if no row has a mask.
    """
    p, truth = logits.float().sigmoid(), masks.float()
    overlap = (p * truth).sum(dim=(2, 3))  # [B, M]
    area = p.sum(dim=(2, 3)) + truth.sum(dim=(2, 3))
    per_row = (1 - (2 * overlap + smooth) / (area + smooth)).mean(dim=1)  # [B]
    return torch.where(known, per_row, 0.0).sum()


@PARTS.register("dice")
class DicePart(LossPart):
    """Over the rows that have a mask; omitted for a model without a mask head."""

    auto = (0.0, 0.20)

    @classmethod
    def weight(cls, name: str, config: LossConfig, outputs: Outputs) -> float | None:
        """As for other parts if there are masks, else None."""
        if outputs.masks:
            return super().weight(name, config, outputs)
        if config.weights != "auto" and config.weights.get(name, 0.0) > 0:
            logger.warning(
                "loss.weights has %s, but there are no masks to train on: the part is left out", name
            )
        return None

    def count(self, batch: Batch) -> int:
        """Rows with a mask."""
        return int(batch["mask_known"].sum()) if "mask_known" in batch else 0

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """See :func:`dice_loss_sum`."""
        if output.mask_logits is None:
            return output.logits[:0].float().sum()
        if "mask" not in batch:
            # A sum over zero rows: exactly 0, but the mask head still takes part in the backward pass.
            return output.mask_logits[:0].float().sum()
        return dice_loss_sum(output.mask_logits, batch["mask"], batch["mask_known"])
