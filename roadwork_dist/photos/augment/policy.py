"""Augmentation policies: the probability of each operation, and its random draws.

Every draw is a pure function of (seed, draw epoch, sample id, index of the view). It does not
depend on the number of workers, the rank, the order of rows or the point of resume.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from roadwork_dist.common.random import derive_seed, generator_for
from roadwork_dist.config.experiment import AugmentConfig
from roadwork_dist.photos.augment import colour, geometric, weather  # noqa: F401  (they register)
from roadwork_dist.photos.augment.batched import TRIVIAL, ViewDraws, prepared
from roadwork_dist.photos.augment.draws import DRAWS
from roadwork_dist.photos.augment.operations import OPERATIONS
from roadwork_dist.photos.augment.trivial import trivial_augment

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
"""Probability of each operation at strength 1, in the order of application."""

VERSION = 1
"""Incremented whenever an operation or the order of draws changes, so that stored features are not mixed."""


def draw_epoch(config: AugmentConfig, epoch: int) -> int:
    """The epoch whose draws ``epoch`` uses: ``epoch`` mod ``copies``, or ``epoch`` with 0 copies."""
    return epoch % config.copies if config.copies else epoch


def chosen_operations(strength: float, rng: np.random.Generator) -> list[str]:
    """Draw the operations of a view; probabilities are scaled by ``strength`` and capped at 1."""
    draws = rng.random(len(PROBABILITIES))
    return [
        name
        for (name, chance), draw in zip(PROBABILITIES.items(), draws, strict=True)
        if draw < min(1.0, chance * strength)
    ]


@dataclass(frozen=True)
class Augmenter:
    """Augments the views of a photo, each view with its own draws.

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
        augmented = torch.empty_like(views)
        for index, view in enumerate(views):
            augmented[index] = augment(view, self._names(sample_id, epoch, index))
        return augmented

    def draws(self, sample_id: str, epoch: int, views: int, side: int) -> list[ViewDraws]:
        """The draws of a photo's views, for ``augmented_on_device``; the same as in a call.

        Args:
            sample_id: the photo's id.
            epoch: epoch of training; see :func:`draw_epoch`.
            views: how many views the photo has.
            side: side of a view in px.
        """
        of_view = self._draws_trivial if self.config.policy == "trivial" else self._draws_roadwork
        return [of_view(self._names(sample_id, epoch, index), side) for index in range(views)]

    def draw_epoch(self, epoch: int) -> int:
        """See :func:`draw_epoch`."""
        return draw_epoch(self.config, epoch)

    def identity(self) -> dict[str, object]:
        """Everything that determines the draws of a given copy, for keys of stored features.

        The number of copies is not included, since copy 1 of 2 equals copy 1 of 4. Nor is mixing, which
        is applied after features are read.
        """
        settings = asdict(self.config)
        for name in ("enabled", "copies", "mix", "mix_alpha", "mix_share"):
            del settings[name]
        return {**settings, "seed": self.seed, "version": VERSION}

    def _names(self, sample_id: str, epoch: int, index: int) -> tuple[int | str, ...]:
        """The inputs of which the draws of a view are a pure function."""
        epoch = draw_epoch(self.config, epoch)
        return ("augment", self.config.policy, self.seed, epoch, sample_id, index)

    def _roadwork(self, view: Tensor, names: tuple[int | str, ...]) -> Tensor:
        rng = generator_for(*names)
        for name in chosen_operations(self.config.strength, rng):
            view = OPERATIONS[name](view, rng)
        return view

    def _draws_roadwork(self, names: tuple[int | str, ...], side: int) -> ViewDraws:
        rng = generator_for(*names)
        names_drawn = chosen_operations(self.config.strength, rng)
        return {name: prepared(name, DRAWS[name](rng, side)) for name in names_drawn}

    def _trivial(self, view: Tensor, names: tuple[int | str, ...]) -> Tensor:
        drawn = self._draws_trivial(names, view.shape[-1])
        return trivial_augment(view, drawn[TRIVIAL]["seed"]) if drawn else view

    def _draws_trivial(self, names: tuple[int | str, ...], side: int) -> ViewDraws:
        """A seed for the single operation, or nothing: here ``strength`` is its probability."""
        if generator_for(*names, "apply").random() >= self.config.strength:
            return {}
        return {TRIVIAL: {"seed": derive_seed(*names)}}


def augmenter_for(config: AugmentConfig, seed: int) -> Augmenter | None:
    """The augmenter for a configuration; ``None`` if augmentation is off."""
    return Augmenter(config, seed) if config.enabled else None
