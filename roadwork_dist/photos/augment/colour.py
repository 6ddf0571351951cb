"""Augmentations of colour and sharpness: brightness, contrast, saturation, hue, noise, blur."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.photos.augment import draws
from roadwork_dist.photos.augment.operations import OPERATIONS, to_uint8


@OPERATIONS.register("brightness")
def brightness(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Multiply by 0.8 to 1.2."""
    from torchvision.transforms.v2 import functional as tv

    changed: Tensor = tv.adjust_brightness(view, draws.brightness(rng, view.shape[-1])["factor"])
    return changed


@OPERATIONS.register("contrast")
def contrast(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Scale the difference from the mean grey by 0.8 to 1.2."""
    from torchvision.transforms.v2 import functional as tv

    changed: Tensor = tv.adjust_contrast(view, draws.contrast(rng, view.shape[-1])["factor"])
    return changed


@OPERATIONS.register("saturation")
def saturation(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Scale the difference from grey by 0.85 to 1.15."""
    from torchvision.transforms.v2 import functional as tv

    changed: Tensor = tv.adjust_saturation(view, draws.saturation(rng, view.shape[-1])["factor"])
    return changed


@OPERATIONS.register("hue")
def hue(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Rotate the hue by up to ±10°."""
    from torchvision.transforms.v2 import functional as tv

    changed: Tensor = tv.adjust_hue(view, draws.hue(rng, view.shape[-1])["turn"])
    return changed


@OPERATIONS.register("noise")
def noise(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Add Gaussian noise of σ 5 to 10 (of 255), independent per pixel and channel."""
    drawn = draws.noise(rng, view.shape[-1])
    return to_uint8(view + torch.from_numpy(drawn["grain"]) * drawn["sigma"])


@OPERATIONS.register("motion_blur")
def motion_blur(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Average horizontally over 1.5 to 4.5 % of the side, as from a moving camera."""
    half = draws.motion_blur(rng, view.shape[-1])["half"]
    wide = F.pad(view.float(), (half, half), mode="replicate")
    return to_uint8(F.avg_pool2d(wide, kernel_size=(1, 2 * half + 1), stride=1))


@OPERATIONS.register("blur")
def blur(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Gaussian blur with a kernel of 3 or 5 px."""
    from torchvision.transforms.v2 import functional as tv

    kernel = draws.blur(rng, view.shape[-1])["kernel"]
    blurred: Tensor = tv.gaussian_blur(view, [kernel, kernel])
    return blurred
