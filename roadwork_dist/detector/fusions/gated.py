"""Gated view fusion (GAFM).

B batch · V views · H width of the head
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadwork_dist.detector.attention import ViewAttention
from roadwork_dist.detector.fusions.base import FUSIONS, FusedViews, ViewFusion
from roadwork_dist.detector.layers import NORM_EPS, init_linear, residual_scale

FUSION_HEADS = 8
"""Heads of both attentions of the view fusion."""

GATE_WIDTH = 128
"""Hidden width of the view gate."""


@FUSIONS.register("gated")
class GatedViewFusion(ViewFusion):
    """GAFM: a gate per view, two attentions, and a mean weighted by the gates.

    1. gᵢ = sigmoid(MLP(xᵢ)), an MLP H → 128 → GELU → 1;
    2. cross-view attention: every view attends to all views, whose values are weighted by their gates
       (residual);
    3. self-attention refinement on the normalized result (residual);
    4. Σ gᵢxᵢ / Σ gᵢ over the real views.

    Args:
        width: H, a multiple of 8.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        scale = residual_scale(1)
        self.gate_hidden = nn.Linear(width, GATE_WIDTH)
        self.gate = nn.Linear(GATE_WIDTH, 1)
        self.cross_attention = ViewAttention(width, FUSION_HEADS, FUSION_HEADS, gate=False, scale=scale)
        self.refine_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.refine = ViewAttention(width, FUSION_HEADS, FUSION_HEADS, gate=False, scale=scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights. The gate's last layer starts at 0, so all gates are ½: the plain mean."""
        init_linear(self.gate_hidden)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.cross_attention.reset_parameters()
        self.refine_norm.reset_parameters()
        self.refine.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor) -> FusedViews:
        """Fuse.

        Args:
            x: normed views [B, V, H].
            mask: [B, V] bool, False = padding; at least one view per row.
        """
        scores = self.gate(F.gelu(self.gate_hidden(x))).squeeze(-1).float()  # [B, V]
        gates = scores.sigmoid().masked_fill(~mask, 0.0)
        x = x + self.cross_attention(x, mask, gates)
        x = x + self.refine(self.refine_norm(x), mask)
        # exp(log gᵢ) / Σ exp(log gⱼ) equals gᵢ / Σ gⱼ, and is still defined when all gates are almost 0.
        weights = F.logsigmoid(scores).masked_fill(~mask, -torch.inf).softmax(dim=1)  # [B, V]
        pooled = (x * weights.unsqueeze(-1).to(x.dtype)).sum(dim=1)
        return FusedViews(pooled, gates)
