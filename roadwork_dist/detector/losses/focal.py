"""Focal loss of the two classes, with label smoothing.

B batch · K classes (2)
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.config.batch import UNLABELLED, Batch, ModelOutput
from roadwork_dist.detector.losses.part import PARTS, LossPart


def focal_loss_sum(
    logits: Tensor,
    labels: Tensor,
    soft_labels: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 0.25,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Sum over labelled rows of the focal loss, equation 5 of arXiv 1708.02002.

    FL(p_k) = -alpha_k (1 - p_k)^gamma log p_k, with alpha_1 = alpha and alpha_0 = 1 - alpha. The loss of a
    row is the expectation of FL over its label: class 1 with probability ``soft``, which is the label itself
    unless photos are mixed. That probability is then smoothed: with label smoothing e, a label of 1 is
    class 1 with probability 1 - e/2. The naive loop::

        total = 0.0
        for row, label, soft in zip(logits, labels, soft_labels or labels):
            if label == UNLABELLED:
                continue
            for k, p in enumerate(softmax(row)):
                q = (1 - label_smoothing) * (soft if k == 1 else 1 - soft) + label_smoothing / 2
                alpha_k = alpha if k == 1 else 1 - alpha
                total += -q * alpha_k * (1 - p) ** gamma * log(p)

    Args:
        logits: [B, 2], any floating dtype; computed in float32.
        labels: [B] int64: 0, 1 or UNLABELLED.
        soft_labels: [B] in [0, 1], share of class 1 in mixed photos; None = nothing is mixed.
        gamma: focusing exponent; 0 = weighted cross-entropy.
        alpha: weight of class 1; class 0 has 1 - alpha.
        label_smoothing: in [0, 1).

    Returns:
        Scalar float32; 0, attached to the graph, if no row is labelled.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)  # [B, K]
    # With two classes, 1 - p_k is the other class's probability: avoids cancellation and 0 ** (gamma - 1).
    modulation = torch.exp(gamma * log_p.flip(-1))
    class_weight = log_p.new_tensor([1 - alpha, alpha])
    known = labels != UNLABELLED
    positive = (labels.clamp_min(0) if soft_labels is None else soft_labels).to(log_p.dtype)
    target = torch.stack([1 - positive, positive], dim=-1)  # [B, K]
    smoothed = target * (1 - label_smoothing) + label_smoothing / 2
    per_row = -(smoothed * class_weight * modulation * log_p).sum(-1)  # [B]
    return torch.where(known, per_row, 0.0).sum()


@PARTS.register("focal")
class FocalPart(LossPart):
    """Over the labelled rows."""

    auto = (0.50, 0.40)

    def count(self, batch: Batch) -> int:
        """Labelled rows."""
        return int((batch["label"] != UNLABELLED).sum())

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """See :func:`focal_loss_sum`."""
        return focal_loss_sum(
            output.logits,
            batch["label"],
            batch.get("soft_label"),
            gamma=self.config.gamma,
            alpha=self.config.alpha,
            label_smoothing=self.config.label_smoothing,
        )
