"""Layers shared by several parts of the head, and their weight initialisation.

B batch · V views · H width of the head · F hidden width of a feed-forward layer · E experts
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6
"""Epsilon of every norm. Torch's default, the epsilon of the dtype, is 0.8 % in bf16."""

SMALL_STD = 0.02
"""Standard deviation of initial weights whose output should start small: logits, embeddings, metadata."""

ACTIVE_EXPERTS = 2
"""Experts that each token is routed to."""

HIDDEN_MULTIPLE = 64
"""Hidden widths are rounded up to a multiple of this, which suits matrix units."""


def init_linear(linear: nn.Linear, *, std: float | None = None, scale: float = 1.0) -> None:
    """Truncated normal weights (cut at two standard deviations) and zero bias.

    Args:
        linear: layer to fill in place.
        std: standard deviation; None = 1/√fan_in (LeCun et al., "Efficient BackProp", 1998), which
            preserves the variance of the input at any width.
        scale: factor on it; :func:`residual_scale` for a layer that ends a residual branch.
    """
    deviation = scale * (1 / math.sqrt(linear.in_features) if std is None else std)
    nn.init.trunc_normal_(linear.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def residual_scale(layers: int) -> float:
    """1/√(2·layers): preserves the variance of a residual stream that 2·layers branches add to (GPT-2, §2.3).

    Not zero, because everything before the layer would then get no gradient at first.
    """
    return 1 / math.sqrt(2 * max(layers, 1))


def promote(x: Tensor) -> Tensor:
    """Cast to fp32 under autocast, so that residual streams and norms are not rounded to bf16."""
    return x.float() if torch.is_autocast_enabled(x.device.type) else x


def hidden_width(width: int, ratio: float) -> int:
    """``ratio * width`` rounded up to a multiple of 64 (512 · 8/3 → 1408)."""
    return math.ceil(round(ratio * width, 6) / HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE


class SwiGLU(nn.Module):
    """Feed-forward layer W₃(SiLU(W₁x) ⊙ W₂x) without biases (arXiv 2002.05202).

    W₁ and W₂ are stored as one matrix, ``in_proj``: one product instead of two.
    """

    def __init__(self, width: int, hidden: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.in_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise the weights."""
        init_linear(self.in_proj)
        init_linear(self.down_proj, scale=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] → [..., H]."""
        gate, value = self.in_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * value)
        return out


class MixtureOfExperts(nn.Module):
    """Feed-forward layer of several SwiGLU experts with top-2 routing.

    A token's output is the average of its two experts, weighted by their router probabilities
    renormalised to sum to 1. Every expert computes every token; unused ones get weight 0. A photo
    has at most a dozen tokens, so gathering would cost more than it saves. Shapes also stay static
    for ``torch.compile``, and each expert has a gradient in every batch, which data parallel
    training relies on.
    """

    def __init__(self, width: int, hidden: int, experts: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(width, hidden, scale=scale) for _ in range(experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise the weights; with small router weights the experts start nearly evenly used."""
        init_linear(self.router, std=SMALL_STD)
        for expert in self.experts:
            assert isinstance(expert, SwiGLU)
            expert.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the experts.

        Args:
            x: tokens [B, V, H].
            mask: [B, V] bool, False = padding; used only for the balance loss.

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
    Transformer's loss (arXiv 2101.03961, eq. 4–6). It is 1 for even use and at most E/k otherwise.
    Since it is computed per row, a batch's value is a mean over rows and does not depend on
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
