"""View fusion by the plain mean.

B batch · V views · H width of the head
"""

import torch
from torch import Tensor

from roadwork_dist.detector.fusions.base import FUSIONS, FusedViews, ViewFusion


@FUSIONS.register("mean")
class MeanFusion(ViewFusion):
    """Mean over the real views; their gates are 1."""

    gates_views = False

    def reset_parameters(self) -> None:
        """Nothing to draw: there are no weights."""

    def forward(self, x: Tensor, mask: Tensor) -> FusedViews:
        """See :meth:`ViewFusion.forward`."""
        gates = mask.to(x.dtype)
        # torch.where instead of a product, which would propagate non-finite padding.
        total = torch.where(mask.unsqueeze(-1), x, 0).sum(dim=1)
        return FusedViews(total / gates.sum(dim=1, keepdim=True).clamp(min=1), gates)
