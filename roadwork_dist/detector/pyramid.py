"""Multi-scale feature pyramid: three projections of each view, merged.

B batch · V views · H width of the head
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadwork_dist.detector.layers import NORM_EPS, init_linear, promote


class MultiScalePyramid(nn.Module):
    """x → norm(x + W[GELU(W₁x), GELU(W₂x), GELU(W₃x)]) with levels of H, H/2 and H/4.

    At H = 512: levels 512, 256, 128, concatenated to 896, back to 512.

    Args:
        width: H, a multiple of 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Linear(width, width // 2**level) for level in range(3))
        self.merge = nn.Linear(width + width // 2 + width // 4, width)
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise the weights."""
        for level in self.levels:
            assert isinstance(level, nn.Linear)
            init_linear(level)
        init_linear(self.merge)
        self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[B, V, H] → [B, V, H]; each view on its own."""
        levels = torch.cat([F.gelu(level(x)) for level in self.levels], dim=-1)  # [B, V, 7H/4]
        out: Tensor = self.norm(promote(x) + self.merge(levels))
        return out
