"""View pruning: a learned score decides which views the rest of the head processes.

B batch · V views · V' views kept · D width of the backbone
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadwork_dist.detector.layers import SMALL_STD, init_linear

_ROUNDING = 1e-9
"""Added before rounding down, so that 0.29 of 100 views (28.999… in floating point) is 29, not 28."""


class KeptViews(NamedTuple):
    """The views that are kept, in their original order.

    A row that keeps fewer views than V' is padded: ``mask`` False, ``kept`` 0.
    """

    features: Tensor  # [B, V', D]
    mask: Tensor  # [B, V'] bool
    kept: Tensor  # [B, V'] int64


def keep_all(features: Tensor, mask: Tensor, views_of_photo: Tensor | None = None) -> KeptViews:
    """No pruning: keep all V views of ``features`` [B, V, D] with ``mask`` [B, V]."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return KeptViews(features, mask, torch.where(mask, positions, 0))


class ViewPruning(nn.Module):
    """Keeps the max(1, ⌊keep·n⌋) best of the n real views of each row.

    The score is an MLP D → D/4 → GELU → 1. Kept features are multiplied by sigmoid(score), because
    the choice alone would give the scorer no gradient.

    Args:
        width: D.
        keep: share of views kept, in (0, 1].
    """

    def __init__(self, width: int, keep: float) -> None:
        super().__init__()
        self.keep = keep
        self.hidden = nn.Linear(width, max(1, width // 4))
        self.score = nn.Linear(max(1, width // 4), 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise the weights; scores start near 0, so no view is preferred at first."""
        init_linear(self.hidden)
        init_linear(self.score, std=SMALL_STD)

    def count(self, views: int) -> int:
        """Number of views kept out of ``views`` real ones."""
        return max(1, math.floor(self.keep * views + _ROUNDING))

    def forward(self, features: Tensor, mask: Tensor, views_of_photo: Tensor | None = None) -> KeptViews:
        """Score, choose and weight.

        Args:
            features: [B, V, D]; padding must be finite.
            mask: [B, V] bool, False = padding; at least one view a row.
            views_of_photo: [B], the n to take the share of where unselected views look like padding;
                None = the number of real views. A row never keeps more than its real views.
        """
        scores = self.score(F.gelu(self.hidden(features))).squeeze(-1).float()  # [B, V]
        views = mask.shape[1]
        # A stable sort, so that ties go to the earlier view on every device.
        order = scores.detach().masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order[:, : self.count(views)]  # [B, V']
        present = mask.sum(dim=1)
        wanted = (present if views_of_photo is None else views_of_photo).double() * self.keep + _ROUNDING
        counts = wanted.floor().clamp(min=1).minimum(present)  # [B]
        real = torch.arange(order.shape[1], device=mask.device) < counts.unsqueeze(1)  # [B, V']
        kept = torch.where(real, order, views).sort(dim=1).values  # views = "none" sorts last
        mask_kept = kept < views
        kept = torch.where(mask_kept, kept, 0)
        weight = scores.gather(1, kept).sigmoid().unsqueeze(-1).to(features.dtype)
        index = kept.unsqueeze(-1).expand(-1, -1, features.shape[-1])
        return KeptViews(features.gather(1, index) * weight, mask_kept, kept)
