"""Groups parameters by weight decay and by layer-wise learning rate."""

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, Protocol, runtime_checkable

from torch import nn

from roadwork_dist.trainer.engine.blocks import repeated_blocks

_NO_DECAY = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Embedding, nn.modules.batchnorm._BatchNorm)

TOKENS = frozenset(
    {
        "cls_token",
        "class_token",
        "dist_token",
        "distillation_token",
        "mask_token",
        "reg_token",
        "register_tokens",
        "pos_embed",
        "pos_embedding",
        "position_embeddings",
    }
)
"""Last parts of the names of embeddings that are bare parameters in timm, transformers and torchvision."""


@runtime_checkable
class HasBody(Protocol):
    """A model that names its body, the network below its head."""

    def body(self) -> nn.Module | None:
        """The network whose layers layer-wise decay counts; None = there is no such network."""


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Split the trainable parameters by weight decay, and by layer if layers have their own learning rates.

    Not decayed: biases, other vectors and scalars, everything inside norms and embeddings, special tokens and
    position embeddings (:data:`TOKENS`), and what a module's ``no_weight_decay()`` names (timm).

    Args:
        model: holds the trainable parameters.
        weight_decay: of the decayed parameters.
        layer_decay: learning rate of a layer relative to the layer above it (ELECTRA, arXiv 2003.10555,
            section 4; BEiT, arXiv 2106.08254): a group's ``lr_scale`` is ``layer_decay ** layers above``.

    Returns:
        Non-empty optimizer groups, each parameter once, in the order of ``model.parameters()``.
    """
    exempt = set(_exempt(model))
    depths = {} if layer_decay == 1 else layer_depths(model)
    top = max(depths.values(), default=0)
    groups: dict[tuple[bool, int], list[nn.Parameter]] = defaultdict(list)
    for p in model.parameters():
        if p.requires_grad:
            is_decayed = p.ndim > 1 and id(p) not in exempt
            groups[is_decayed, depths.get(id(p), top)].append(p)
    return [
        {
            "params": members,
            "weight_decay": weight_decay if is_decayed else 0.0,
            "lr_scale": layer_decay ** (top - depth),
        }
        for (is_decayed, depth), members in sorted(groups.items(), key=lambda item: (-item[0][0], item[0][1]))
    ]


def _exempt(model: nn.Module) -> Iterator[int]:
    """``id`` of each matrix that is exempt from weight decay, and of some vectors."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, _NO_DECAY) or name in TOKENS:
                yield id(parameter)
        patterns = _named_by(module)
        for name, parameter in module.named_parameters() if patterns else ():
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                yield id(parameter)


def _named_by(module: nn.Module) -> set[str]:
    """What a module's ``no_weight_decay()`` returns: names or patterns of names, relative to the module."""
    method = getattr(module, "no_weight_decay", None)
    if not inspect.isroutine(method):  # a flag or a layer of that name
        return set()
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):  # another method: it needs arguments, or has no signature
        return set()
    names = method()
    if isinstance(names, str) or not isinstance(names, Iterable):
        return set()
    return {name for name in names if isinstance(name, str)}


def layer_depths(model: nn.Module) -> dict[int, int]:
    """Depth of each parameter (by ``id``), 0 = nearest to the input.

    Every repeated block is a layer, and so is what precedes, separates and follows the blocks, in order of
    definition. If a model names its body, everything outside the body is the topmost layer.
    """
    method = getattr(model, "body", None)  # a sub-module of that name is no such method
    body = model.body() if isinstance(model, HasBody) and inspect.ismethod(method) else model
    blocks = [] if body is None else repeated_blocks(body)
    block_of = {id(p): number for number, block in enumerate(blocks) for p in block.parameters()}
    depths: dict[int, int] = {}
    depth, previous = 0, None
    for p in () if body is None else body.parameters():
        block = block_of.get(id(p))
        depth += bool(depths) and block != previous
        depths[id(p)], previous = depth, block
    above = depth + 1 if body is not model else depth
    return depths | {id(p): above for p in model.parameters() if id(p) not in depths}
