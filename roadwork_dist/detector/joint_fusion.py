"""Fuses the vector of the views with the metadata.

B batch · H width of the head
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadwork_dist.detector.layers import init_linear


class JointFusion(nn.Module):
    """Vision and metadata → one vector: linear, GELU, dropout.

    Args:
        vision_width: width of the pooled views.
        metadata_width: width of the metadata; 0 = vision only.
        dropout: probability that an element is dropped.
    """

    def __init__(self, vision_width: int, metadata_width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width + metadata_width, vision_width)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights."""
        init_linear(self.linear)

    def forward(self, vision: Tensor, metadata: Tensor | None) -> Tensor:
        """[B, H] and [B, metadata_width] (None if built for vision only) → [B, H]."""
        joined = vision if metadata is None else torch.cat([vision, metadata.to(vision.dtype)], dim=-1)
        out: Tensor = self.dropout(F.gelu(self.linear(joined)))
        return out
