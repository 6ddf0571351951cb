"""Token merging (ToMe, arXiv 2210.09461) inside the vision transformers of transformers.

In every block, between attention and MLP, the r most similar pairs of patch tokens become one token each.
Nothing is learned and no weight changes. The first tokens (CLS, registers) are never merged, nor merged into.

N views · T tokens of a view, prefix first · P patch tokens · A, B the two halves of them · R pairs merged ·
D width · H heads · E width of a head
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from roadwork_dist.common.errors import ConfigError

PARTS = ("norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "layer_scale2")
"""What a block must consist of, in the order of its forward pass."""


class Tokens(NamedTuple):
    """What is known of a view's tokens besides their content, on entering a block."""

    sizes: Tensor | None  # [N, T] float32, patches that a token stands for; null = one each
    rotation: tuple[Tensor, Tensor] | None  # cos and sin of patch tokens, broadcast to [N, H, P, E]
    places: Tensor | None = None  # [N, patches] the patch token that each patch is in now; null = its own


@dataclass
class Merging:
    """State of one forward pass of a network: its tokens on entering each block.

    One entry a block, and not one that moves on: where activations are computed again in the backward pass
    (gradient checkpointing), a block must meet the tokens that it met before.
    """

    patches: int | None = None
    """Patch tokens before the first block."""
    entering: dict[int, Tokens] = field(default_factory=dict)

    def spread(self, patch_tokens: Tensor) -> Tensor:
        """Each patch the token that it ended in: [N, P, D] behind the last block → [N, patches, D]."""
        places = self.entering[max(self.entering)].places
        return patch_tokens if places is None else _rows(patch_tokens, places)


def merged_by(share: float, patches: int, blocks: int, block: int) -> int:
    """Patch tokens that are gone behind block ``block`` (from 0) of ``blocks``: as many in each."""
    return int(share * patches * (block + 1) / blocks + 1e-9)


class MergingBlock(nn.Module):
    """Mixed into the class of a block: its forward pass with a merge between attention and MLP.

    Attributes are set by :func:`merge_tokens`. The block's own modules do all the arithmetic.
    """

    place: int
    """Number of the block, from 0."""
    blocks: int
    share: float
    prefix: int
    """CLS and registers."""
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
        """As the block's own, with ``merging`` of this forward pass of the network."""
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
        # For this pass only: a hook that stayed would point at this block from a deep copy of it as well.
        hook = block.attention.k_proj.register_forward_hook(lambda *seen: keys.append(seen[-1].detach()))
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
        assert merging.patches is not None  # the first block has run
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
    """Which patch tokens of each view are merged; A are those at even places, B those at odd ones."""

    kept: Tensor  # [N, A - R] places in A of those that stay, ascending
    gone: Tensor  # [N, R] places in A of those that are merged
    into: Tensor  # [N, R] places in B that they are merged into


def match_tokens(similar: Tensor, pairs: int) -> Match:
    """Bipartite soft matching (section 3 of the paper).

    Tokens are dealt to A and B in turn; each of A is joined with its most similar one of B (cosine), and
    the ``pairs`` most similar joins are merged. Several may be merged into the same token of B.

    Args:
        similar: [N, P, E], by whose cosine tokens are compared: keys, mean over heads.
        pairs: R, at most ⌊P / 2⌋.
    """
    unit = nn.functional.normalize(similar.float(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # [N, A, B]
    best, into = scores.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)  # [N, A]
    gone = order[:, :pairs]
    return Match(order[:, pairs:].sort(dim=1).values, gone, into.gather(1, gone))


def apply_match(x: Tensor, tokens: Tokens, match: Match, prefix: int) -> tuple[Tensor, Tokens]:
    """Merge: tokens become means weighted by size; their sizes add up.

    A merged token keeps the rotary position of the token of B it was merged into: a position of the grid,
    which the network knows, where a mean of rotations would be none.

    Args:
        x: [N, T, D].
        tokens: sizes and positions of the tokens of ``x``.
        match: which patch tokens to merge.
        prefix: tokens before the patch tokens; they stay.

    Returns:
        [N, T - R, D] in the order prefix, kept tokens of A, tokens of B; and their sizes and positions.
    """
    sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if tokens.sizes is None else tokens.sizes
    patch_sizes = sizes[:, prefix:]
    size_a, size_b = patch_sizes[:, ::2], patch_sizes[:, 1::2]
    # A product with a matrix of sizes rather than a scatter: on a GPU a scatter adds in any order, and a
    # feature would not be the same twice.
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
    """[N, P] where each patch token stands after a merge."""
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
    """Rotations of the tokens that are left: [P, E] or [N, 1, P, E] → [N, 1, P - R, E]."""
    each = rotation.expand(views, *rotation.shape) if rotation.ndim == 2 else rotation.squeeze(1)
    return torch.cat([_rows(each[:, ::2], match.kept), each[:, 1::2]], dim=1).unsqueeze(1)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """[N, A, D] at [N, K] → [N, K, D]."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def proportional_bias(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores so that a token of s patches counts s times: log s (section 3).

    Args:
        sizes: [N, T].
        dtype: of the queries.

    Returns:
        [N, 1, T, T] (a view), same for every query.
    """
    bias = sizes.log().to(dtype)[:, None, None, :]
    return bias.expand(-1, -1, sizes.shape[1], -1)


def merge_tokens(network: nn.Module, share: float, name: str) -> None:
    """Make the blocks of a network merge tokens; its forward pass then takes ``merging=Merging()``.

    Parameters keep their names, and blocks the name of their class.

    Args:
        network: of the DINOv2 or DINOv3 families of transformers.
        share: share of the patch tokens that is gone behind the last block.
        name: what messages call the network.

    Raises:
        ConfigError: its blocks are built otherwise.
    """
    config: Any = network.config
    blocks = [module for module in network.modules() if all(hasattr(module, part) for part in PARTS)]
    if not blocks or not config.model_type.startswith(("dinov2", "dinov3_vit")):
        raise ConfigError(
            f"backbone.token_merging is {share}, but {name} ({type(network).__name__}) is no DINOv2 or "
            "DINOv3 of transformers: set it to 0"
        )
    for place, module in enumerate(blocks):
        block: Any = module
        # The class and not the method: transformers wraps the forward pass of a subclass with its gradient
        # checkpointing, and looks blocks up by the name of their class.
        block.__class__ = _merging_class(type(block))  # type: ignore[arg-type]
        block.place, block.blocks, block.share = place, len(blocks), share
        block.prefix = 1 + getattr(config, "num_register_tokens", 0)
        block.heads = config.num_attention_heads


@cache
def _merging_class(block: type) -> type:
    """One class for all blocks of a kind: engines find the blocks of a network by what they share."""
    return type(block.__name__, (MergingBlock, block), {})
