"""Floating-point operations of a network: counted, and worked out for vision transformers.

A multiplication and an addition are two operations. Only matrix products, convolutions and attention
count, as in the literature on model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def count_operations(function: Callable[[], Any]) -> int:
    """Operations of the matrix products, convolutions and attention that a function runs.

    Works on tensors of the meta device, which computes nothing and needs no memory.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


@dataclass(frozen=True, kw_only=True)
class VisionTransformer:
    """The sizes of a vision transformer that decide its cost.

    Attributes:
        width: D, of a token.
        blocks: transformer blocks.
        hidden: width of the feed-forward part.
        gated: the feed-forward part has a gate (SwiGLU): three matrices instead of two.
        patch: side of a patch in px.
        extra_tokens: class and register tokens.
        parameters: all weights.
    """

    width: int
    blocks: int
    hidden: int
    gated: bool
    patch: int
    extra_tokens: int
    parameters: int

    def tokens(self, side: int) -> int:
        """Tokens of a square view of ``side`` px."""
        return self.extra_tokens + (side // self.patch) ** 2

    def forward_operations(self, side: int) -> int:
        """Operations of the forward pass of one RGB view of ``side`` px.

        Patch embedding, and per block: four projections of attention, scores and weighted values
        (each T·T·D multiplications), and two or three matrices of the feed-forward part.
        """
        tokens, width = self.tokens(side), self.width
        embedding = 2 * (side // self.patch) ** 2 * width * 3 * self.patch**2
        matrices = 4 * width * width + (3 if self.gated else 2) * width * self.hidden
        attention = 2 * tokens * tokens * width
        return embedding + self.blocks * 2 * (tokens * matrices + attention)


VIT_H_PLUS = VisionTransformer(
    width=1280, blocks=32, hidden=5120, gated=True, patch=16, extra_tokens=5, parameters=840_592_640
)
"""DINOv3 ViT-H+/16 with one class and four register tokens (arXiv 2508.10104, table 1)."""


def training_operations(forward: float, learning_share: float, *, weights_learn: bool = True) -> float:
    """Operations of forward and backward pass, without what gradient checkpointing computes again.

    The backward pass of a layer costs its forward pass twice: once for the gradient of its input, once
    for that of its weights (arXiv 2204.02311, appendix B).

    Args:
        forward: operations of the forward pass.
        learning_share: share of them from the first layer that learns to the end; 0 = frozen.
        weights_learn: the layers' own weights learn; False = only small adapters beside them do (PEFT),
            so that the gradients of the big matrices are never computed.
    """
    return forward * (1 + learning_share * (2 if weights_learn else 1))
