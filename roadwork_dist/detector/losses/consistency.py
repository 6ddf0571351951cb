"""Consistency loss: the predictions of the views of one photo should agree.

B batch · V views · K classes
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.config.batch import Batch, ModelOutput
from roadwork_dist.detector.losses.part import PARTS, LossPart, rows_of_one_photo


def consistency_loss_sum(view_logits: Tensor, view_mask: Tensor) -> Tensor:
    r"""Sum over photos of the mean over views of KL(p_i || mean p).

    The mean over views of that divergence is the generalised Jensen-Shannon divergence of the
    views' predictions with equal weights (Lin 1991, "Divergence measures based on the Shannon
    entropy", equation 5.1). The gradient flows through the mean as well. The naive loop::

        total = 0.0
        for row, mask in zip(view_logits, view_mask):
            views = [softmax(view) for view, real in zip(row, mask) if real]
            if len(views) < 2:
                continue  # one view agrees with itself
            mean = sum(views) / len(views)
            total += sum((p * log(p / mean)).sum() for p in views) / len(views)

    Args:
        view_logits: [B, V, K], any floating dtype; computed in float32.
        view_mask: [B, V] bool, False = no such view; its logits are not read.

    Returns:
        Scalar float32; 0, attached to the graph, if no photo has two views.
    """
    real = view_mask.unsqueeze(-1)  # [B, V, 1]
    # Replaced before the softmax, so that the content of padding affects neither value nor gradient.
    log_p = F.log_softmax(torch.where(real, view_logits.float(), 0.0), dim=-1)  # [B, V, K]
    count = view_mask.sum(dim=1)  # [B]
    safe_count = count.clamp_min(1).to(log_p.dtype)
    p = torch.where(real, log_p.exp(), 0.0)
    # Clamped for photos without a view; with real views, the mean is below that only where p is 0 as well.
    mean_p = (p.sum(dim=1) / safe_count.unsqueeze(-1)).clamp_min(torch.finfo(log_p.dtype).tiny)  # [B, K]
    divergence = (p * (log_p - mean_p.log().unsqueeze(1))).sum(dim=(1, 2)) / safe_count  # [B]
    return torch.where(count >= 2, divergence, 0.0).sum()


def rows_with_agreement(view_mask: Tensor) -> int:
    """Number of photos with at least two views, from [B, V] bool: the rows with a target of this loss."""
    return int((view_mask.sum(dim=1) >= 2).sum())


@PARTS.register("consistency")
class ConsistencyPart(LossPart):
    """Over the photos with at least two views."""

    auto = (0.30, 0.25)

    def count(self, batch: Batch) -> int:
        """Photos with at least two views."""
        return rows_with_agreement(rows_of_one_photo(batch["view_mask"], batch))

    def __call__(self, output: ModelOutput, batch: Batch) -> Tensor:
        """See :func:`consistency_loss_sum`."""
        return consistency_loss_sum(output.view_logits, rows_of_one_photo(output.view_mask, batch))
