"""Geometric augmentations: flip, rotation, perspective, zoom.

Areas from outside the view are filled with its mean colour.
"""

import numpy as np
from torch import Tensor

from roadwork_dist.photos.augment import draws
from roadwork_dist.photos.augment.operations import OPERATIONS


def _mean_colour(view: Tensor) -> list[float]:
    colour: list[float] = view[:, ::4, ::4].float().mean((1, 2)).round().tolist()
    return colour


def _affine(view: Tensor, angle: float, scale: float) -> Tensor:
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    moved: Tensor = tv.affine(
        view,
        angle=angle,
        translate=[0.0, 0.0],
        scale=scale,
        shear=[0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
        fill=_mean_colour(view),
    )
    return moved


@OPERATIONS.register("flip")
def flip(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Flip horizontally."""
    return view.flip(-1)


@OPERATIONS.register("rotate")
def rotate(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Rotate by up to ±15° about the centre."""
    return _affine(view, **draws.rotate(rng, view.shape[-1]), scale=1.0)


@OPERATIONS.register("zoom")
def zoom(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Scale by 0.8 to 1.2 about the centre."""
    return _affine(view, angle=0.0, **draws.zoom(rng, view.shape[-1]))


@OPERATIONS.register("perspective")
def perspective(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Move each corner inwards independently, by up to a tenth of the side."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    drawn = draws.perspective(rng, view.shape[-1])
    seen: Tensor = tv.perspective(
        view,
        startpoints=drawn["corners"].tolist(),
        endpoints=drawn["moved"].tolist(),
        interpolation=InterpolationMode.BILINEAR,
        fill=_mean_colour(view),
    )
    return seen
