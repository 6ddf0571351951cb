"""Token merging (ToMe, arXiv 2210.09461) for the vision transformers in transformers.

In every block, between attention and MLP, the r most similar pairs of patch tokens become one token each.
Nothing is trained and no weight changes. The first tokens (CLS, registers) never take part in a merge.

N views · T tokens of a view, prefix first · P patch tokens · A, B their two halves · R pairs merged ·
D width · H heads · E width of a head
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from roadwork_dist.common.errors import ConfigError

PARTS = ("norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2")
"""Modules that a block must have, in the order of its forward pass."""


class Tokens(NamedTuple):
    """State of the tokens besides their content, at the input of a block."""

    sizes: Tensor | None  # [N, T] float32, patches merged into each token; None = one each
    rotation: tuple[Tensor, Tensor] | None  # cos and sin of patch tokens, broadcast to [N, H, P, E]
    places: Tensor | None = None  # [N, patches] patch token that holds each patch; None = its own


@dataclass
class Merging:
    """State of one forward pass of a network: its tokens at the input of each block.

    There is one entry per block because gradient checkpointing runs blocks again in the backward pass, and
    each must then find the same state as before.
    """

    patches: int | None = None
    """Patch tokens before the first block."""
    entering: dict[int, Tokens] = field(default_factory=dict)

    def spread(self, patch_tokens: Tensor) -> Tensor:
        """Each patch's merged token: [N, P, D] after the last block → [N, patches, D]."""
        places = self.entering[max(self.entering)].places
        return patch_tokens if places is None else _rows(patch_tokens, places)


def merged_by(share: float, patches: int, blocks: int, block: int) -> int:
    """Patch tokens merged away after block ``block`` (from 0) of ``blocks``; the same number in each."""
    return int(share * patches * (block + 1) / blocks + 1e-9)


class MergingBlock(nn.Module):
    """Mixin for the class of a block: its forward pass with a merge between attention and MLP.

    Attributes are set by :func:`merge_tokens`. All computation is done by the block's own modules.
    """

    place: int
    """Number of the block, from 0."""
    blocks: int
    share: float
    prefix: int
    """Number of CLS and register tokens."""
    heads: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        merging: Merging,
        **kwargs: Any,
    ) -> Tensor:
        """Like the block's own, with the ``merging`` state of this forward pass of the network."""
        block: Any = self
        if self.place == 0:
            merging.patches = hidden_states.shape[1] - self.prefix
            merging.entering[0] = Tokens(None, position_embeddings)
        tokens = merging.entering[self.place]
        if tokens.rotation is not None:
            kwargs["position_embeddings"] = tokens.rotation
        if tokens.sizes is not None:
            attention_mask = proportional_bias(tokens.sizes, hidden_states.dtype)
        keys: list[Tensor] = []  # before rotation, [N, T, H·E]
        # For this pass only: in a deep copy of the block, a permanent hook would still refer to this one.
        hook = block.attention.k_proj.register_forward_hook(lambda *call: keys.append(call[-1].detach()))
        try:
            attended, _ = block.attention(block.norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        finally:
            hook.remove()
        x = block.drop_path(block.layer_scale1(attended)) + hidden_states
        x, left = self._merge(x, keys[0], tokens, merging)
        merging.entering[self.place + 1] = left
        out: Tensor = block.drop_path(block.layer_scale2(block.mlp(block.norm2(x)))) + x
        return out

    def _merge(self, x: Tensor, keys: Tensor, tokens: Tokens, merging: Merging) -> tuple[Tensor, Tokens]:
        assert merging.patches is not None  # set by the first block
        patches = x.shape[1] - self.prefix
        left = merging.patches - merged_by(self.share, merging.patches, self.blocks, self.place)
        pairs = min(patches - left, patches // 2)
        if pairs <= 0:
            return x, tokens
        with torch.no_grad():
            by_head = keys[:, self.prefix :].reshape(len(keys), patches, self.heads, -1)
            match = match_tokens(by_head.mean(dim=2), pairs)
        return apply_match(x, tokens, match, self.prefix)


class Match(NamedTuple):
    """Which patch tokens of each view are merged; A are those at even positions, B those at odd ones."""

    kept: Tensor  # [N, A - R] positions in A of those that are kept, ascending
    gone: Tensor  # [N, R] positions in A of those that are merged
    into: Tensor  # [N, R] positions in B that they are merged into


def match_tokens(similar: Tensor, pairs: int) -> Match:
    """Bipartite soft matching (section 3 of the paper).

    Tokens are assigned to A and B alternately. Each token of A is paired with its most similar token of B
    (cosine), and the ``pairs`` most similar pairs are merged. Several may be merged into the same token of B.

    Args:
        similar: [N, P, E], vectors whose cosine is compared: keys, mean over heads.
        pairs: R, at most ⌊P / 2⌋.
    """
    unit = nn.functional.normalize(similar.float(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # [N, A, B]
    best, into = scores.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)  # [N, A]
    gone = order[:, :pairs]
    return Match(order[:, pairs:].sort(dim=1).values, gone, into.gather(1, gone))


def apply_match(x: Tensor, tokens: Tokens, match: Match, prefix: int) -> tuple[Tensor, Tokens]:
    """Merge tokens: a merged token is the mean weighted by size, and its size is the sum.

    It keeps the rotary position of its token of B, which is a grid position that the network was trained on;
    a mean of rotations would not be one.

    Args:
        x: [N, T, D].
        tokens: sizes and positions of the tokens of ``x``.
        match: which patch tokens to merge.
        prefix: number of tokens before the patch tokens; they are kept.

    Returns:
        [N, T - R, D] in the order prefix, kept tokens of A, tokens of B; and their sizes and positions.
    """
    sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if tokens.sizes is None else tokens.sizes
    patch_sizes = sizes[:, prefix:]
    size_a, size_b = patch_sizes[:, ::2], patch_sizes[:, 1::2]
    # A matrix product rather than a scatter: on a GPU, a scatter adds in arbitrary order, so features would
    # not be reproducible.
    weight = nn.functional.one_hot(match.into, size_b.shape[1]) * size_a.gather(1, match.gone).unsqueeze(-1)
    weight = weight.transpose(1, 2)  # [N, B, R]
    total = size_b + weight.sum(dim=2)
    a, b = x[:, prefix::2].float(), x[:, prefix + 1 :: 2].float()
    merged = (b * size_b.unsqueeze(-1) + weight @ _rows(a, match.gone)) / total.unsqueeze(-1)
    x = torch.cat([x[:, :prefix], _rows(x[:, prefix::2], match.kept), merged.to(x.dtype)], dim=1)
    new_sizes = torch.cat([sizes[:, :prefix], size_a.gather(1, match.kept), total], dim=1)
    places = _new_places(match, size_b.shape[1])
    if tokens.places is not None:
        places = places.gather(1, tokens.places)
    if tokens.rotation is None:
        return x, Tokens(new_sizes, None, places)
    cos, sin = (_rotation_left(part, match, len(x)) for part in tokens.rotation)
    return x, Tokens(new_sizes, (cos, sin), places)


def _new_places(match: Match, count_b: int) -> Tensor:
    """[N, P], the position of each patch token after a merge."""
    views, stay = match.kept.shape
    count = stay + match.gone.shape[1] + count_b
    places = match.kept.new_empty(views, count)
    of_a = match.kept.new_empty(views, count - count_b)
    of_a.scatter_(1, match.kept, torch.arange(stay, device=of_a.device).expand(views, -1))
    of_a.scatter_(1, match.gone, match.into + stay)
    places[:, ::2] = of_a
    places[:, 1::2] = torch.arange(stay, stay + count_b, device=of_a.device)
    return places


def _rotation_left(rotation: Tensor, match: Match, views: int) -> Tensor:
    """Rotations of the remaining tokens: [P, E] or [N, 1, P, E] → [N, 1, P - R, E]."""
    each = rotation.expand(views, *rotation.shape) if rotation.ndim == 2 else rotation.squeeze(1)
    return torch.cat([_rows(each[:, ::2], match.kept), each[:, 1::2]], dim=1).unsqueeze(1)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Gather rows: [N, A, D] at [N, K] → [N, K, D]."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def proportional_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Bias on attention scores, log s, with which a token of s patches counts s times (section 3).

    Args:
        sizes: [N, T].
        dtype: dtype of the queries.

    Returns:
        [N, 1, T, T] (a view), the same for every query.
    """
    bias = sizes.log().to(dtype)[:, None, None, :]
    return bias.expand(-1, -1, sizes.shape[1], -1)


def merge_tokens(network: nn.Module, share: float, name: str) -> None:
    """Make the blocks of a network merge tokens; its forward pass then takes ``merging=Merging()``.

    Parameter names, and the class names of blocks, do not change.

    Args:
        network: DINOv2 or DINOv3 from transformers.
        share: share of the patch tokens that is merged away after the last block.
        name: name of the network in messages.

    Raises:
        ConfigError: it is another network, or its blocks are structured differently.
    """
    config: Any = network.config
    blocks = [module for module in network.modules() if all(hasattr(module, part) for part in PARTS)]
    if not blocks or not config.model_type.startswith(("dinov2", "dinov3_vit")):
        raise ConfigError(
            f"backbone.token_merging is {share}, but {name} ({type(network).__name__}) is not a DINOv2 "
            "or DINOv3 of transformers: set it to 0"
        )
    for place, module in enumerate(blocks):
        block: Any = module
        # Replace the class, not the method: transformers wraps the forward pass of a subclass with its
        # gradient checkpointing, and finds blocks by their class name.
        block.__class__ = _merging_class(type(block))  # type: ignore[arg-type]
        block.place, block.blocks, block.share = place, len(blocks), share
        block.prefix = 1 + getattr(config, "num_register_tokens", 0)
        block.heads = config.num_attention_heads


@cache
def _merging_class(block: type) -> type:
    """One class per block type, because engines find the blocks of a network by their common class."""
    return type(block.__name__, (MergingBlock, block), {})
