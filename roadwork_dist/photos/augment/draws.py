"""Random draws of the fifteen operations, separate from their application.

The operations on one view (CPU) and those on a batch (any device) both take their draws from here, in the
same order and from the same generator. So a view is augmented the same way on every device.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Draws = dict[str, Any]
"""Draws of an operation for one view: numbers and numpy arrays by name."""

MAX_ROTATION = 15.0  # degrees
ZOOM = (0.8, 1.2)
MAX_CORNER_SHIFT = 0.1  # of the side
BRIGHTNESS = CONTRAST = 0.20
SATURATION = 0.15
HUE = 10 / 360  # of the colour circle
NOISE_SIGMA = (5.0, 10.0)  # in units of 1/255
MOTION_LENGTH = (0.015, 0.045)  # of the side
BLUR_KERNELS = (3, 5)  # px
MOST_STREAKS = 200
STREAK_LENGTH = (0.05, 0.11)  # of the side


def flip(rng: np.random.Generator, side: int) -> Draws:
    """Nothing."""
    return {}


def rotate(rng: np.random.Generator, side: int) -> Draws:
    """Angle in degrees."""
    return {"angle": rng.uniform(-MAX_ROTATION, MAX_ROTATION)}


def zoom(rng: np.random.Generator, side: int) -> Draws:
    """Scale factor."""
    return {"scale": rng.uniform(*ZOOM)}


def perspective(rng: np.random.Generator, side: int) -> Draws:
    """Target position of each of the four corners, in px (clockwise from the upper left)."""
    last = side - 1
    corners = np.array([[0, 0], [last, 0], [last, last], [0, last]])
    inwards = np.sign(last / 2 - corners)
    moved = np.rint(corners + inwards * rng.uniform(0, MAX_CORNER_SHIFT * last, (4, 2))).astype(int)
    return {"corners": corners, "moved": moved}


def brightness(rng: np.random.Generator, side: int) -> Draws:
    """Factor."""
    return {"factor": rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS)}


def contrast(rng: np.random.Generator, side: int) -> Draws:
    """Factor."""
    return {"factor": rng.uniform(1 - CONTRAST, 1 + CONTRAST)}


def saturation(rng: np.random.Generator, side: int) -> Draws:
    """Factor."""
    return {"factor": rng.uniform(1 - SATURATION, 1 + SATURATION)}


def hue(rng: np.random.Generator, side: int) -> Draws:
    """Rotation of the hue, in turns."""
    return {"turn": rng.uniform(-HUE, HUE)}


def rain(rng: np.random.Generator, side: int) -> Draws:
    """Streaks: count, length in px, slant, start and brightness of each; factor that dims the view."""
    count = int(rng.integers(80, MOST_STREAKS))
    length = max(3, round(rng.uniform(*STREAK_LENGTH) * side))
    slant = rng.uniform(-0.35, 0.35)
    top = rng.uniform(-length, side, (count, 1))
    left = rng.uniform(-0.1 * side, 1.1 * side, (count, 1))
    light = rng.uniform(0.2, 0.55, (count, 1))
    dim = rng.uniform(0.8, 0.95)
    return {"length": length, "slant": slant, "top": top, "left": left, "light": light, "dim": dim}


def fog(rng: np.random.Generator, side: int) -> Draws:
    """Patches [4, 4], density at the top, grey value 0…255."""
    patches = rng.uniform(-0.15, 0.15, (1, 1, 4, 4)).astype(np.float32)[0, 0]
    return {"patches": patches, "density": rng.uniform(0.3, 0.65), "grey": rng.uniform(190, 235)}


def shadow(rng: np.random.Generator, side: int) -> Draws:
    """Direction in radians; position, half width and edge softness in units of the side; darkness 0…1."""
    return {
        "angle": rng.uniform(0, np.pi),
        "centre": rng.uniform(-0.35, 0.35),
        "half_width": rng.uniform(0.08, 0.3),
        "softness": rng.uniform(0.004, 0.02),
        "darkness": rng.uniform(0.35, 0.65),
    }


def sun_glare(rng: np.random.Generator, side: int) -> Draws:
    """Centre and radius in units of the side, strength 0…1."""
    return {
        "x": rng.uniform(0, 1),
        "y": rng.uniform(0, 0.5),
        "radius": rng.uniform(0.15, 0.45),
        "strength": rng.uniform(0.6, 0.95),
    }


def noise(rng: np.random.Generator, side: int) -> Draws:
    """Standard deviation in units of 1/255, and standard normal noise [3, S, S]."""
    sigma = rng.uniform(*NOISE_SIGMA)
    return {"sigma": sigma, "grain": rng.standard_normal((3, side, side), dtype=np.float32)}


def motion_blur(rng: np.random.Generator, side: int) -> Draws:
    """Half the length of the blur, in px."""
    return {"half": max(1, round(rng.uniform(*MOTION_LENGTH) * side / 2))}


def blur(rng: np.random.Generator, side: int) -> Draws:
    """Side of the kernel, in px."""
    return {"kernel": int(rng.choice(BLUR_KERNELS))}


DRAWS: dict[str, Callable[[np.random.Generator, int], Draws]] = {
    draw.__name__: draw
    for draw in (
        *(flip, rotate, perspective, zoom),
        *(brightness, contrast, saturation, hue),
        *(rain, fog, shadow, sun_glare),
        *(noise, motion_blur, blur),
    )
}
"""Operation name -> function of (generator, side of the view) that makes its draws."""
