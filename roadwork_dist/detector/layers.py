"""Layers that several parts of the head share, and how their weights start.

B batch · V views · H width of the head · F hidden width of a feed-forward layer · E experts
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6
"""Epsilon of every norm; torch's default (the dtype's epsilon) is 0.8 % in bf16."""

SMALL_STD = 0.02
"""Spread of weights whose output should start small: logits, embeddings, metadata."""

ACTIVE_EXPERTS = 2
"""Experts that see a token."""

HIDDEN_MULTIPLE = 64
"""Hidden widths are rounded up to a multiple of this (matrix units like it)."""


def init_linear(linear: nn.Linear, *, std: float | None = None, scale: float = 1.0) -> None:
    """Truncated normal weights (cut at two deviations) and zero bias.

    Args:
        linear: layer to fill in place.
        std: deviation; null = 1/√fan_in (LeCun et al., "Efficient BackProp", 1998), with which a
            layer keeps the variance of its input at any width.
        scale: factor on the deviation; :func:`residual_scale` for a layer that ends a residual branch.
    """
    deviation = scale * (1 / math.sqrt(linear.in_features) if std is None else std)
    nn.init.trunc_normal_(linear.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def residual_scale(layers: int) -> float:
    """1/√(2·layers): keeps the variance of a stream that 2·layers branches add to (GPT-2, §2.3).

    Preferred to zero, with which everything before the layer would get no gradient at first.
    """
    return 1 / math.sqrt(2 * max(layers, 1))


def promote(x: Tensor) -> Tensor:
    """fp32 under autocast, unchanged elsewhere: residual streams and norms do not round to bf16."""
    return x.float() if torch.is_autocast_enabled(x.device.type) else x


def hidden_width(width: int, ratio: float) -> int:
    """``ratio * width`` rounded up to a multiple of 64 (512 · 8/3 → 1408)."""
    return math.ceil(round(ratio * width, 6) / HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE


class SwiGLU(nn.Module):
    """Feed-forward layer W₃(SiLU(W₁x) ⊙ W₂x) without biases (arXiv 2002.05202).

    W₁ and W₂ are one matrix, ``in_proj``: one product instead of two.
    """

    def __init__(self, width: int, hidden: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.in_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights."""
        init_linear(self.in_proj)
        init_linear(self.down_proj, scale=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] → [..., H]."""
        gate, value = self.in_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * value)
        return out


class MixtureOfExperts(nn.Module):
    """Feed-forward layer of several SwiGLU experts, of which a token uses the two it scores highest.

    A token's output is the average of its two experts, weighted by their router probabilities
    renormalised to sum to 1. Every expert computes every token and the others' weights are 0: a
    photo has at most a dozen tokens, so gathering would cost more than it saves, shapes stay
    static for ``torch.compile``, and each expert has a gradient whatever the batch, which data
    parallel training relies on.
    """

    def __init__(self, width: int, hidden: int, experts: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(width, hidden, scale=scale) for _ in range(experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights; a small router starts near even use."""
        init_linear(self.router, std=SMALL_STD)
        for expert in self.experts:
            assert isinstance(expert, SwiGLU)
            expert.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the experts.

        Args:
            x: tokens [B, V, H].
            mask: [B, V] bool, False = padding; only counts for the balance.

        Returns:
            Mixed tokens [B, V, H] and the load-balancing loss per row [B].
        """
        probabilities = self.router(x).float().softmax(dim=-1)  # [B, V, E]
        best, chosen = probabilities.topk(ACTIVE_EXPERTS, dim=-1)  # [B, V, 2]
        best = best / best.sum(dim=-1, keepdim=True)
        weights = torch.zeros_like(probabilities).scatter(-1, chosen, best).to(x.dtype)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)  # [B, V, H, E]
        mixed = (outputs * weights.unsqueeze(-2)).sum(dim=-1)
        return mixed, load_balance(probabilities, chosen, mask)


def load_balance(probabilities: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    """Sequence-wise load-balancing loss: Σₑ fₑ Pₑ for each row.

    fₑ = E/(k·T) · (tokens of the row that chose e), Pₑ = mean probability of e over the row's T
    tokens: DeepSeek-V3's form (arXiv 2412.19437, eq. 17–20; α is the loss's weight) of Switch
    Transformer's loss (arXiv 2101.03961, eq. 4–6). 1 when use is even, up to E/k when it is not.
    It is taken per row, so a batch's value is a mean over rows and does not change with
    accumulation or the number of processes.

    Args:
        probabilities: router probabilities [B, V, E].
        chosen: chosen experts [B, V, k].
        mask: [B, V] bool, False = padding.

    Returns:
        [B].
    """
    experts, active = probabilities.shape[-1], chosen.shape[-1]
    real = mask.unsqueeze(-1).to(probabilities.dtype)  # [B, V, 1]
    tokens = real.sum(dim=1).clamp(min=1)  # [B, 1]
    use = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)  # [B, V, E], no gradient
    share = (use * real).sum(dim=1) * experts / (active * tokens)
    mean = (probabilities * real).sum(dim=1) / tokens
    return (share * mean).sum(dim=-1)
