"""Antialiased Lanczos resize by matrix products, for devices where torch does not provide it.

Torch's resize with this filter runs on CPUs only. Along one axis it is a product with a weight matrix,
which is faster on a GPU than gathering the pixels.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

LOBES = 3


@lru_cache(maxsize=64)
def weights(length: int, wanted: int) -> Tensor:
    """Weights [wanted, length] float32 of each input pixel in each output pixel, as in Pillow.

    Args:
        length: px along the axis before the resize.
        wanted: px after it.
    """
    scale = length / wanted
    stretch = max(scale, 1.0)
    centres = (np.arange(wanted) + 0.5)[:, None] * scale
    distance = (np.arange(length)[None, :] + 0.5 - centres) / stretch
    values = np.where(np.abs(distance) < LOBES, np.sinc(distance) * np.sinc(distance / LOBES), 0.0)
    return torch.from_numpy((values / values.sum(1, keepdims=True)).astype(np.float32))


def resize(image: Tensor, width: int, height: int) -> Tensor:
    """Resize [3, H, W] uint8 on its device; each axis is rounded to uint8, as in the CPU's resize."""
    for axis, wanted in ((-1, width), (-2, height)):
        if image.shape[axis] != wanted:
            matrix = weights(image.shape[axis], wanted).to(image.device, non_blocking=True)
            pixels = image.to(torch.float32)
            product = pixels @ matrix.T if axis == -1 else matrix @ pixels
            image = product.round_().clamp_(0, 255).to(torch.uint8)
    return image
