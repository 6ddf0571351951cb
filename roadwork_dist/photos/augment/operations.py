"""Registry of the fifteen augmentation operations, and their common arithmetic.

An operation takes one view [3, S, S] uint8 and a generator, draws its strength from the
generator, and returns a new view of the same shape and type. Lengths are fractions of S, so the effect
looks the same in views of 224 px and of 512 px.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from roadwork_dist.common.registry import Registry

Operation = Callable[[Tensor, np.random.Generator], Tensor]

OPERATIONS: Registry[Operation] = Registry("augmentation")


def to_uint8(view: Tensor) -> Tensor:
    """Round and clamp a float view in 0…255 (changed in place) to uint8."""
    return view.round_().clamp_(0, 255).to(torch.uint8)


def blend(view: Tensor, colour: Tensor | float, alpha: Tensor) -> Tensor:
    """``(1 - alpha) · view + alpha · colour`` as uint8.

    Args:
        view: [3, S, S] uint8.
        colour: one number, or a tensor that broadcasts to the view, 0…255.
        alpha: [S, S] or a tensor that broadcasts to it, 0…1.
    """
    pixels = view.float()
    return to_uint8(pixels + (colour - pixels) * alpha)


def unit_grid(side: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Coordinates of the pixels in 0…1: y as [S, 1] and x as [1, S]; ``device`` None = the CPU."""
    steps = (torch.arange(side, device=device) + 0.5) / side
    return steps[:, None], steps[None, :]
