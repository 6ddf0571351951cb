"""Operations that imitate weather and light: rain, fog, shadow, sun glare. Synthetic, not physical."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.data.augment.operations import OPERATIONS, blend, unit_grid

SUN_COLOUR = (255.0, 250.0, 235.0)


@OPERATIONS.register("rain")
def rain(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw slanted bright streaks and take a little light away."""
    side = view.shape[-1]
    count = int(rng.integers(80, 200))
    length = max(3, round(rng.uniform(0.05, 0.11) * side))
    slant = rng.uniform(-0.35, 0.35)
    steps = np.arange(length)
    tops = rng.uniform(-length, side, (count, 1)), rng.uniform(-0.1 * side, 1.1 * side, (count, 1))
    rows = np.floor(tops[0] + steps).astype(int)
    columns = np.floor(tops[1] + slant * steps).astype(int)
    light = np.broadcast_to(rng.uniform(0.2, 0.55, (count, 1)), rows.shape)
    streaks = np.zeros((side, side), np.float32)
    for shift in range(max(1, round(side / 256))):  # streaks keep their share of the view's width
        seen = (rows >= 0) & (rows < side) & (columns + shift >= 0) & (columns + shift < side)
        streaks[rows[seen], columns[seen] + shift] = light[seen]
    dimmed = view * rng.uniform(0.8, 0.95)
    return blend(dimmed, 215.0, torch.from_numpy(streaks))


@OPERATIONS.register("fog")
def fog(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Lay a pale veil over the view, denser at the top, where things are far, and in patches."""
    side = view.shape[-1]
    y, _ = unit_grid(side)
    patches = torch.from_numpy(rng.uniform(-0.15, 0.15, (1, 1, 4, 4)).astype(np.float32))
    patches = F.interpolate(patches, size=(side, side), mode="bilinear", align_corners=True)[0, 0]
    density = rng.uniform(0.3, 0.65) * (1 - 0.6 * y) + patches
    return blend(view, rng.uniform(190, 235), density.clamp_(0, 1))


@OPERATIONS.register("shadow")
def shadow(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Darken a band across the view, as the shadow of a pole, a wall or a bridge."""
    y, x = unit_grid(view.shape[-1])
    angle = rng.uniform(0, np.pi)
    along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)  # [S, S], signed distance to the centre
    centre, half_width = rng.uniform(-0.35, 0.35), rng.uniform(0.08, 0.3)
    softness = rng.uniform(0.004, 0.02)
    inside = torch.sigmoid((half_width - (along - centre).abs()) / softness)
    return blend(view, 0.0, inside * rng.uniform(0.35, 0.65))


@OPERATIONS.register("sun_glare")
def sun_glare(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Wash out a round spot in the upper half with warm light that fades outwards."""
    y, x = unit_grid(view.shape[-1])
    centre_x, centre_y, radius = rng.uniform(0, 1), rng.uniform(0, 0.5), rng.uniform(0.15, 0.45)
    distance2 = ((x - centre_x) ** 2 + (y - centre_y) ** 2) / radius**2
    alpha = rng.uniform(0.6, 0.95) * torch.exp(-distance2)
    return blend(view, torch.tensor(SUN_COLOUR)[:, None, None], alpha)
