"""Gated attention between the views of a photo.

B batch · V views · H width of the head · N heads · G key/value heads · C width of a head
"""

from torch import Tensor, nn
from torch.nn import functional as F

from roadwork_dist.detector.layers import (
    NORM_EPS,
    MixtureOfExperts,
    SwiGLU,
    init_linear,
    promote,
    residual_scale,
)


class ViewAttention(nn.Module):
    """Multi-head attention between views with normalised queries and keys and an output gate.

    The gate is elementwise and head-specific: a sigmoid of a linear map of the layer's (normalised)
    input multiplies the attention output before the output projection (arXiv 2505.06708, its best
    variant, G1). Queries and keys pass an RMSNorm over the head width (arXiv 2302.05442).

    Args:
        width: H.
        heads: N, a divisor of H.
        kv_heads: G, a divisor of N; each serves N/G query heads (arXiv 2305.13245).
        gate: whether to multiply by the sigmoid gate.
        scale: factor on the initial standard deviation of ``out_proj``.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, *, gate: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.scale = scale
        self.qkv_proj = nn.Linear(width, (heads + 2 * kv_heads) * self.head_width, bias=False)
        self.gate_proj = nn.Linear(width, width, bias=False) if gate else None
        self.out_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(self.head_width, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(self.head_width, eps=NORM_EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise the weights; gates start around one half."""
        init_linear(self.qkv_proj)
        init_linear(self.out_proj, scale=self.scale)
        if self.gate_proj is not None:
            init_linear(self.gate_proj)
        self.q_norm.reset_parameters()
        self.k_norm.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor, value_weight: Tensor | None = None) -> Tensor:
        """Attend from every view to the real views.

        Args:
            x: normalised views [B, V, H].
            mask: [B, V] bool, False = padding, which is not attended to.
            value_weight: [B, V], weight of each view's value; None = 1.

        Returns:
            [B, V, H]; finite but meaningless at padding.
        """
        rows, views, width = x.shape
        heads = self.qkv_proj(x).view(rows, views, -1, self.head_width).transpose(1, 2)  # [B, N+2G, V, C]
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        query, key = self.q_norm(promote(query)), self.k_norm(promote(key))
        if value_weight is not None:
            value = value * value_weight[:, None, :, None].to(value.dtype)
        read = F.scaled_dot_product_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attn_mask=mask[:, None, None, :],
            enable_gqa=self.kv_heads != self.heads,
        )  # [B, N, V, C]
        read = read.transpose(1, 2).reshape(rows, views, width)
        if self.gate_proj is not None:
            read = read * self.gate_proj(x).sigmoid()
        out: Tensor = self.out_proj(read)
        return out


class GatedAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + FFN(norm(x)).

    Args:
        width: H.
        heads: query heads.
        kv_heads: key/value heads.
        gate: gate the attention output.
        hidden: hidden width of the FFN (of each expert).
        experts: experts of the FFN; 0 = plain SwiGLU.
        layers: blocks in the stack; scales the initial weights of layers that end a residual branch.
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, *, gate: bool, hidden: int, experts: int, layers: int
    ) -> None:
        super().__init__()
        scale = residual_scale(layers)
        self.attention_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.attention = ViewAttention(width, heads, kv_heads, gate=gate, scale=scale)
        self.ffn_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.ffn: SwiGLU | MixtureOfExperts
        if experts:
            self.ffn = MixtureOfExperts(width, hidden, experts, scale=scale)
        else:
            self.ffn = SwiGLU(width, hidden, scale=scale)

    def reset_parameters(self) -> None:
        """Reinitialise the weights."""
        self.attention_norm.reset_parameters()
        self.attention.reset_parameters()
        self.ffn_norm.reset_parameters()
        self.ffn.reset_parameters()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Views [B, V, H] with ``mask`` [B, V] → views [B, V, H] and load-balancing loss [B]."""
        x = x + self.attention(self.attention_norm(x), mask)
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, MixtureOfExperts):
            update, balance = self.ffn(normed, mask)
            return x + update, balance
        return x + self.ffn(normed), x.new_zeros(x.shape[0])
