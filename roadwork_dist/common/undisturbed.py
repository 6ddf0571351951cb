"""Leaving a model as it was: modes, buffers and random states around what must not change them."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from roadwork_dist.common.random import capture_rng, restore_rng

logger = logging.getLogger(__name__)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a block, then put back the mode and buffers of every sub-module, and the random states.

    Also after an error. Modes are put back one by one: a part that was in eval mode on purpose stays so.
    """
    random = capture_rng()
    modes = [(module, module.training) for module in model.modules()]
    put_buffers_back = hold_buffers(list(model.modules()))
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode  # not train(mode), which would go down to the sub-modules
        put_buffers_back()
        restore_rng(random)


def enter_train_mode(model: nn.Module) -> None:
    """Put a model into train mode, but not the parts that were handed over in eval mode.

    A model that is in eval mode as a whole, as Hugging Face loads one, is put into train mode. Parts that its
    own ``train()`` leaves in eval mode stay in it.
    """
    kept = [module for module in model.modules() if not module.training] if model.training else []
    if not model.training:
        logger.info("%s was given in eval mode: all of it is put into train mode", type(model).__name__)
    model.train()
    for module in kept:
        module.training = False


def moving_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that forward passes in training may change (batch statistics): of modules in train mode."""
    return [buffer for part in moving_parts(model) for buffer in part.buffers(recurse=False)]


def moving_parts(model: nn.Module) -> list[nn.Module]:
    """Modules in train mode that have such buffers."""
    return [part for part in model.modules() if part.training and any(True for _ in part.buffers(False))]


def hold_buffers(parts: Sequence[nn.Module]) -> Callable[[], None]:
    """Copy the buffers of modules; what is returned puts the copies back."""
    # By name: a forward pass may put another tensor in a buffer's place.
    held = [
        (part, name, buffer, buffer.clone())
        for part in parts
        for name, buffer in part.named_buffers(recurse=False)
    ]

    @torch.no_grad()
    def put_back() -> None:
        for part, name, buffer, before in held:
            if part.get_buffer(name) is not buffer:
                setattr(part, name, buffer)
            write_buffer(part, name, before)

    return put_back


@torch.no_grad()
def write_buffer(part: nn.Module, name: str, value: Tensor) -> None:
    """Give a buffer a value, in its own memory where that can be written.

    An expanded buffer, whose elements share memory, is replaced.
    """
    buffer: Tensor = getattr(part, name)
    if buffer.shape == value.shape and torch.equal(buffer, value):
        return
    try:
        buffer.copy_(value)
    except RuntimeError:  # elements that share memory, or another shape
        setattr(part, name, value.to(buffer.dtype).clone())
