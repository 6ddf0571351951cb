"""Floating-point operations of a network: measured, and estimated in closed form for vision transformers.

A multiplication and an addition are two operations. Only matrix products, convolutions and attention
count, as in the literature on model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def count_operations(function: Callable[[], Any]) -> int:
    """Count the operations of the matrix products, convolutions and attention that a function runs.

    Works on meta tensors, which need neither computation nor memory.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


@dataclass(frozen=True, kw_only=True)
class VisionTransformer:
    """The dimensions of a vision transformer that determine its cost.

    Attributes:
        width: D, the width of a token.
        blocks: transformer blocks.
        hidden: width of the feed-forward part.
        gated: whether the feed-forward part is gated (SwiGLU): three matrices instead of two.
        patch: side of a patch in px.
        extra_tokens: number of class and register tokens.
        parameters: number of all weights.
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

        Patch embedding, and per block: four attention projections, scores and weighted values
        (each T·T·D multiplications), and two or three matrices of the feed-forward part.
        """
        tokens, width = self.tokens(side), self.width
        embedding = 2 * (side // self.patch) ** 2 * width * 3 * self.patch**2
        matrices = 4 * width * width + (3 if self.gated else 2) * width * self.hidden
        attention = 2 * tokens * tokens * width
        return embedding + self.blocks * 2 * (tokens * matrices + attention)

    def activation_bytes(self, side: int, *, blocks: int | None = None, recomputes: bool = False) -> int:
        """Bytes of activations that a view needs for the backward pass under bf16 autocast.

        What autograd saves per token and block: the inputs of the matrices, of both norms (fp32), of
        both layer scales and of the gate's product, and the queries, keys, values and outputs of
        attention (fused, so no scores).

        Args:
            side: side of the view in px.
            blocks: number of last blocks that are trained; None = all.
            recomputes: gradient checkpointing: only the fp32 input of each block, and one whole block.
        """
        tokens, count = self.tokens(side), self.blocks if blocks is None else blocks
        wide, hidden = (32, 8) if self.gated else (30, 4)
        block = tokens * (wide * self.width + hidden * self.hidden)
        return count * 4 * tokens * self.width + block if recomputes else count * block

    def workspace_bytes(self, side: int) -> int:
        """Peak temporary bytes per view in the forward pass of a frozen bf16 network.

        The residual, the normalised input, and the hidden activations of the feed-forward part.
        """
        return 2 * self.tokens(side) * (2 * self.width + (3 if self.gated else 2) * self.hidden)

    @property
    def block_parameters(self) -> int:
        """Number of weights in the matrices of a block."""
        return 4 * self.width**2 + (3 if self.gated else 2) * self.width * self.hidden


VIT_H_PLUS = VisionTransformer(
    width=1280, blocks=32, hidden=5120, gated=True, patch=16, extra_tokens=5, parameters=840_592_640
)
"""DINOv3 ViT-H+/16 with one class and four register tokens (arXiv 2508.10104, table 1)."""


def training_operations(forward: float, learning_share: float, *, weights_learn: bool = True) -> float:
    """Operations of forward and backward pass, without the recomputation of gradient checkpointing.

    The backward pass of a layer costs twice its forward pass: once for the gradient of its input, once
    for that of its weights (arXiv 2204.02311, appendix B).

    Args:
        forward: operations of the forward pass.
        learning_share: share of them from the first trainable layer to the end; 0 = frozen.
        weights_learn: whether the layers' own weights are trained; False = only small adapters are
            (PEFT), so the gradients of the large matrices are never computed.
    """
    return forward * (1 + learning_share * (2 if weights_learn else 1))
