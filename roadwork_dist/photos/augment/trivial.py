"""TrivialAugment (arXiv 2103.10158): one operation at a random magnitude."""

from functools import cache
from typing import Any

from torch import Tensor

from roadwork_dist.common.random import isolated_rng


@cache
def _trivial_augment() -> Any:
    from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide

    return TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)


def trivial_augment(view: Tensor, seed: int) -> Tensor:
    """Augment a view [3, S, S] uint8, on any device, with the draws of ``seed``."""
    with isolated_rng(seed):  # torchvision draws from torch's global CPU generator
        augmented: Tensor = _trivial_augment()(view)
    return augmented
