"""Antialiased Lanczos resize as products of matrices, for devices where torch has none of its own.

Torch's resize with this filter runs on CPUs only. Along one axis it is a product with a matrix of weights,
which a GPU does faster than it could gather them.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

LOBES = 3


@lru_cache(maxsize=64)
def weights(length: int, wanted: int) -> Tensor:
    """Weights [wanted, length] float32 of every pixel in every resized one, as Pillow defines them.

    Args:
        length: px along the axis.
        wanted: px after it.
    """
    scale = length / wanted
    stretch = max(scale, 1.0)
    centres = (np.arange(wanted) + 0.5)[:, None] * scale
    distance = (np.arange(length)[None, :] + 0.5 - centres) / stretch
    values = np.where(np.abs(distance) < LOBES, np.sinc(distance) * np.sinc(distance / LOBES), 0.0)
    return torch.from_numpy((values / values.sum(1, keepdims=True)).astype(np.float32))


def resize(image: Tensor, width: int, height: int) -> Tensor:
    """Resize [3, H, W] uint8 on its device; each axis is rounded to uint8, as the CPU's resize does."""
    for axis, wanted in ((-1, width), (-2, height)):
        if image.shape[axis] != wanted:
            matrix = weights(image.shape[axis], wanted).to(image.device, non_blocking=True)
            pixels = image.to(torch.float32)
            product = pixels @ matrix.T if axis == -1 else matrix @ pixels
            image = product.round_().clamp_(0, 255).to(torch.uint8)
    return image
