"""Where a model repeats itself: the unit of sharding and of regional compilation."""

from collections import Counter

from torch import nn


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Modules that stand at least twice, with the same class, in one ``ModuleList`` or ``Sequential``.

    Those inside another such block are left out, and so are leaves (a ``Sequential`` of activations).
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
    """Compile in place, so that no name in the state dict gets a prefix.

    Args:
        model: not yet wrapped by an engine.
        mode: of ``torch.compile``; ``default`` is torch's own.
        regional: compile each repeated block, which share one compiled code, where there are any: a
            compilation takes as long as one block's instead of the model's.
    """
    torch_mode = None if mode == "default" else mode
    regions = repeated_blocks(model) if regional else []
    for module in regions or [model]:
        module.compile(mode=torch_mode)
