"""Finds a model's repeated blocks: the unit of sharding and of regional compilation."""

from collections import Counter

from torch import nn


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Modules whose class occurs at least twice in one ``ModuleList`` or ``Sequential``.

    Blocks inside another block are excluded, and so are leaves (a ``Sequential`` of activations).
    """
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        children = list(module.children())
        classes = Counter(type(child) for child in children)
        is_list = isinstance(module, nn.ModuleList | nn.Sequential)
        for child in children:
            if is_list and classes[type(child)] > 1 and next(child.children(), None) is not None:
                found.append(child)
            else:
                visit(child)

    visit(model)
    return found


def repeated_classes(model: nn.Module) -> set[type[nn.Module]]:
    """Classes of :func:`repeated_blocks`."""
    return {type(block) for block in repeated_blocks(model)}


def compile_model(model: nn.Module, mode: str, *, regional: bool = True) -> None:
    """Compile in place, which adds no prefix to names in the state dict.

    Args:
        model: not yet wrapped by an engine.
        mode: of ``torch.compile``; ``default`` is torch's own.
        regional: compile the repeated blocks, if any, instead of the whole model. They share compiled code,
            so compilation takes as long as for one block.
    """
    torch_mode = None if mode == "default" else mode
    regions = repeated_blocks(model) if regional else []
    for module in regions or [model]:
        module.compile(mode=torch_mode)
