"""Operations on colour and sharpness: brightness, contrast, saturation, hue, noise, blur."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.data.augment.operations import OPERATIONS, to_uint8

BRIGHTNESS = CONTRAST = 0.20
SATURATION = 0.15
HUE = 10 / 360  # of the colour circle
NOISE_SIGMA = (5.0, 10.0)  # in units of 1/255
MOTION_LENGTH = (0.015, 0.045)  # of the side
BLUR_KERNELS = (3, 5)  # px


@OPERATIONS.register("brightness")
def brightness(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Multiply by 0.8 to 1.2."""
    from torchvision.transforms.v2 import functional as tv

    changed: Tensor = tv.adjust_brightness(view, rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS))
    return changed


@OPERATIONS.register("contrast")
def contrast(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Stretch the distance to the mean grey by 0.8 to 1.2."""
    from torchvision.transforms.v2 import functional as tv

    changed: Tensor = tv.adjust_contrast(view, rng.uniform(1 - CONTRAST, 1 + CONTRAST))
    return changed


@OPERATIONS.register("saturation")
def saturation(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Stretch the distance to grey by 0.85 to 1.15."""
    from torchvision.transforms.v2 import functional as tv

    changed: Tensor = tv.adjust_saturation(view, rng.uniform(1 - SATURATION, 1 + SATURATION))
    return changed


@OPERATIONS.register("hue")
def hue(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Turn the colour circle by up to ±10°."""
    from torchvision.transforms.v2 import functional as tv

    changed: Tensor = tv.adjust_hue(view, rng.uniform(-HUE, HUE))
    return changed


@OPERATIONS.register("noise")
def noise(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Add Gaussian noise of σ 5 to 10 (of 255), each pixel and channel its own."""
    sigma = rng.uniform(*NOISE_SIGMA)
    grain = torch.from_numpy(rng.standard_normal(tuple(view.shape), dtype=np.float32))
    return to_uint8(view + grain * sigma)


@OPERATIONS.register("motion_blur")
def motion_blur(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Mean over a horizontal stretch of 1.5 to 4.5 % of the side, as of a moving camera."""
    half = max(1, round(rng.uniform(*MOTION_LENGTH) * view.shape[-1] / 2))
    wide = F.pad(view.float(), (half, half), mode="replicate")
    return to_uint8(F.avg_pool2d(wide, kernel_size=(1, 2 * half + 1), stride=1))


@OPERATIONS.register("blur")
def blur(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Gaussian blur with a kernel of 3 or 5 px."""
    from torchvision.transforms.v2 import functional as tv

    kernel = int(rng.choice(BLUR_KERNELS))
    blurred: Tensor = tv.gaussian_blur(view, [kernel, kernel])
    return blurred
