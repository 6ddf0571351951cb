"""Augmentations that imitate weather and light: rain, fog, shadow, sun glare. Not physically based."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from roadwork_dist.photos.augment import draws
from roadwork_dist.photos.augment.operations import OPERATIONS, blend, unit_grid

SUN_COLOUR = (255.0, 250.0, 235.0)
STREAK_COLOUR = 215.0


def streak_width(side: int) -> int:
    """Width of a streak in px: a fixed share of the view's width."""
    return max(1, round(side / 256))


@OPERATIONS.register("rain")
def rain(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Draw slanted bright streaks and darken the view slightly."""
    side = view.shape[-1]
    drawn = draws.rain(rng, side)
    steps = np.arange(drawn["length"])
    rows = np.floor(drawn["top"] + steps).astype(int)
    columns = np.floor(drawn["left"] + drawn["slant"] * steps).astype(int)
    light = np.broadcast_to(drawn["light"], rows.shape)
    streaks = np.zeros((side, side), np.float32)
    for shift in range(streak_width(side)):
        seen = (rows >= 0) & (rows < side) & (columns + shift >= 0) & (columns + shift < side)
        streaks[rows[seen], columns[seen] + shift] = light[seen]
    return blend(view * drawn["dim"], STREAK_COLOUR, torch.from_numpy(streaks))


@OPERATIONS.register("fog")
def fog(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Blend a pale grey over the view in patches, denser at the top, where objects are far away."""
    side = view.shape[-1]
    y, _ = unit_grid(side)
    drawn = draws.fog(rng, side)
    patches = torch.from_numpy(drawn["patches"])[None, None]
    patches = F.interpolate(patches, size=(side, side), mode="bilinear", align_corners=True)[0, 0]
    density = drawn["density"] * (1 - 0.6 * y) + patches
    return blend(view, drawn["grey"], density.clamp_(0, 1))


@OPERATIONS.register("shadow")
def shadow(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Darken a band across the view, like the shadow of a pole, a wall or a bridge."""
    y, x = unit_grid(view.shape[-1])
    drawn = draws.shadow(rng, view.shape[-1])
    angle = drawn["angle"]
    along = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)  # [S, S], signed distance to the centre
    inside = torch.sigmoid((drawn["half_width"] - (along - drawn["centre"]).abs()) / drawn["softness"])
    return blend(view, 0.0, inside * drawn["darkness"])


@OPERATIONS.register("sun_glare")
def sun_glare(view: Tensor, rng: np.random.Generator) -> Tensor:
    """Blend warm light over a round spot in the upper half, fading outwards."""
    y, x = unit_grid(view.shape[-1])
    drawn = draws.sun_glare(rng, view.shape[-1])
    distance2 = ((x - drawn["x"]) ** 2 + (y - drawn["y"]) ** 2) / drawn["radius"] ** 2
    alpha = drawn["strength"] * torch.exp(-distance2)
    return blend(view, torch.tensor(SUN_COLOUR)[:, None, None], alpha)
