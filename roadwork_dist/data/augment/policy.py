"""How often each operation is used, and the draws behind it.

Every draw is a pure function of (seed, draw epoch, sample id, index of the view): it does not
depend on the number of workers, the rank, the order of rows or the point of resume.
"""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roadwork_dist.common.random import derive_seed, generator_for, isolated_rng
from roadwork_dist.config.experiment import AugmentConfig
from roadwork_dist.data.augment import colour, geometric, weather  # noqa: F401  (they register)
from roadwork_dist.data.augment.operations import OPERATIONS

PROBABILITIES = {
    "flip": 0.50,
    "rotate": 0.30,
    "perspective": 0.20,
    "zoom": 0.30,
    "brightness": 0.40,
    "contrast": 0.40,
    "saturation": 0.30,
    "hue": 0.20,
    "rain": 0.25,
    "fog": 0.20,
    "shadow": 0.25,
    "sun_glare": 0.15,
    "noise": 0.15,
    "motion_blur": 0.10,
    "blur": 0.10,
}
"""Chance of each operation at strength 1, in the order in which they are applied."""

VERSION = 1
"""Raised whenever an operation or the order of draws changes, so that stored features are not mixed."""


def draw_epoch(config: AugmentConfig, epoch: int) -> int:
    """The epoch whose draws ``epoch`` uses: ``epoch`` mod ``copies``, or ``epoch`` with 0 copies."""
    return epoch % config.copies if config.copies else epoch


def chosen_operations(strength: float, rng: np.random.Generator) -> list[str]:
    """Draw which operations a view gets; chances are scaled by ``strength`` and capped at 1."""
    draws = rng.random(len(PROBABILITIES))
    return [
        name
        for (name, chance), draw in zip(PROBABILITIES.items(), draws, strict=True)
        if draw < min(1.0, chance * strength)
    ]


@cache
def _trivial_augment() -> Any:
    from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide

    return TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)


@dataclass(frozen=True)
class Augmenter:
    """Augments the views of a photo, each view with draws of its own.

    Args:
        config: policy, strength and number of copies.
        seed: seed of the run.
    """

    config: AugmentConfig
    seed: int

    def __call__(self, views: Tensor, sample_id: str, epoch: int) -> Tensor:
        """Augment the views of one photo.

        Args:
            views: [V, 3, S, S] uint8; not changed.
            sample_id: the photo's id.
            epoch: epoch of training; see :func:`draw_epoch`.

        Returns:
            [V, 3, S, S] uint8, contiguous.
        """
        augment = self._trivial if self.config.policy == "trivial" else self._roadwork
        names = ("augment", self.config.policy, self.seed, draw_epoch(self.config, epoch), sample_id)
        augmented = torch.empty_like(views)
        for index, view in enumerate(views):
            augmented[index] = augment(view, (*names, index))
        return augmented

    def draw_epoch(self, epoch: int) -> int:
        """See :func:`draw_epoch`."""
        return draw_epoch(self.config, epoch)

    def identity(self) -> dict[str, object]:
        """All that decides the draws of a given copy, for keys of stored features.

        The number of copies is not part of it: copy 1 of 2 is copy 1 of 4. Nor is mixing, which
        comes after features are read.
        """
        settings = asdict(self.config)
        for name in ("enabled", "copies", "mix", "mix_alpha", "mix_share"):
            del settings[name]
        return {**settings, "seed": self.seed, "version": VERSION}

    def _roadwork(self, view: Tensor, names: tuple[int | str, ...]) -> Tensor:
        rng = generator_for(*names)
        for name in chosen_operations(self.config.strength, rng):
            view = OPERATIONS[name](view, rng)
        return view

    def _trivial(self, view: Tensor, names: tuple[int | str, ...]) -> Tensor:
        """TrivialAugment (arXiv 2103.10158): one operation at a random magnitude."""
        if generator_for(*names, "apply").random() >= self.config.strength:
            return view
        with isolated_rng(derive_seed(*names)):  # torchvision draws from torch's global generator
            augmented: Tensor = _trivial_augment()(view)
        return augmented


def augmenter_for(config: AugmentConfig, seed: int) -> Augmenter | None:
    """The augmenter of a configuration; ``None`` where augmentation is off."""
    return Augmenter(config, seed) if config.enabled else None
