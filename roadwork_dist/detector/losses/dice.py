"""Auxiliary losses: the weather, and where the roadwork is.

B batch · M mask classes (6)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.config.batch import WEATHER


def weather_loss_sum(logits: Tensor, weather: Tensor) -> Tensor:
    """Sum over rows with a known weather of the cross-entropy.

    The naive loop::

        total = 0.0
        for row, word in zip(logits, weather):
            if word != len(WEATHER):  # the index after the last word is null
                total += -log(softmax(row)[word])

    Args:
        logits: [B, len(WEATHER)], any floating dtype; computed in float32.
        weather: [B] int64, len(WEATHER) = null.

    Returns:
        Scalar float32; 0, attached to the graph, if no weather is known.
    """
    return F.cross_entropy(logits.float(), weather, ignore_index=len(WEATHER), reduction="sum")


def dice_loss_sum(logits: Tensor, masks: Tensor, known: Tensor, *, smooth: float = 1.0) -> Tensor:
    """Sum over rows with a mask of the Dice loss, a mean over the mask classes.

    1 - (2 Σ p·g + s) / (Σ p + Σ g + s) per class (arXiv 1707.03237, with s added so that a class
    that is absent from photo and prediction costs nothing). The naive loop::

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
