"""Camera projection and lighting of a synthetic photo: metres to pixels, surfaces to colours."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Colour = tuple[float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class View:
    """A pinhole camera above a flat, gently curved road.

    Coordinates: x metres to the right of the camera (measured along the bend), y metres up from the
    ground, z metres ahead.
    """

    width: int
    height: int
    focal: float  # px
    centre: float  # px, column of the point straight ahead
    horizon: float  # px, row of the horizon
    eye: float  # m, height of the camera
    bend: float  # 1/m, curvature of the road

    def scale(self, z: float) -> float:
        """Pixels per metre at distance ``z``."""
        return self.focal / z

    def pixel(self, x: float, y: float, z: float) -> Point:
        """Column and row of a point."""
        s = self.focal / z
        return self.centre + s * (x + 0.5 * self.bend * z * z), self.horizon + s * (self.eye - y)


def random_view(rng: np.random.Generator, width: int, height: int) -> View:
    """A camera as if behind a windscreen; the scene does not depend on the photo's size."""
    return View(
        width=width,
        height=height,
        focal=width * rng.uniform(0.62, 0.85),
        centre=width * rng.uniform(0.46, 0.54),
        horizon=height * rng.uniform(0.42, 0.5),
        eye=rng.uniform(1.3, 1.7),
        bend=rng.uniform(-0.0016, 0.0016),
    )


@dataclass(frozen=True)
class Light:
    """Lighting for a time of day and a weather."""

    gain: Colour  # multiplies every surface
    sky: tuple[Colour, Colour]  # at the top and at the horizon, 0-255
    haze: Colour  # colour that distant surfaces fade to
    density: float  # 1/m, haze
    headlights: float  # strength of the camera car's headlights, 0 by day
    contrast: float  # 0 = no cast shadows, 1 = strong
    cloud: float  # share of the sky covered by cloud
    sun: float  # strength of the glow around the sun, 0 = not visible

    def fade(self, z: float) -> float:
        """Share of a surface's own colour that remains at distance ``z``."""
        return math.exp(-self.density * z)

    def gain_at(self, z: float) -> NDArray[np.float32]:
        """[3] light on a surface at distance ``z``, headlights included."""
        beam = self.headlights * math.exp(-z / 28.0)
        return np.asarray(self.gain, dtype=np.float32) + np.float32(beam)

    def shade(self, colour: Colour, z: float, strength: float = 1.0) -> tuple[int, int, int]:
        """Colour of a lit surface as seen at distance ``z``; ``strength`` < 1 for sides in shadow."""
        lit = np.asarray(colour, dtype=np.float32) * self.gain_at(z) * np.float32(strength)
        return self.hazed(tuple(lit.tolist()), z)

    def hazed(self, colour: Colour, z: float) -> tuple[int, int, int]:
        """Colour of a light source as seen at distance ``z``."""
        t = self.fade(z)
        r, g, b = (int(min(255, max(0, c * t + h * (1 - t)))) for c, h in zip(colour, self.haze, strict=True))
        return r, g, b


_GAIN: dict[str, Colour] = {
    "day": (1.0, 1.0, 1.0),
    "light": (1.16, 1.14, 1.08),
    "dawn": (0.86, 0.76, 0.78),
    "dusk": (0.78, 0.6, 0.55),
    "night": (0.17, 0.18, 0.26),
}
_CLEAR_SKY: dict[str, tuple[Colour, Colour]] = {
    "day": ((74, 128, 196), (186, 210, 230)),
    "light": ((110, 164, 224), (226, 236, 244)),
    "dawn": ((96, 116, 168), (246, 196, 178)),
    "dusk": ((62, 62, 112), (240, 144, 92)),
    "night": ((8, 10, 22), (32, 34, 52)),
}
_CLOUD = {
    "sunny": 0.12,
    "clear": 0.02,
    "cloudy": 0.55,
    "overcast": 1.0,
    "rainy": 1.0,
    "foggy": 1.0,
    "snowy": 1.0,
}
_DENSITY = {"foggy": 0.034, "rainy": 0.007, "snowy": 0.009, "overcast": 0.0025}
_DIM = {"cloudy": 0.92, "overcast": 0.82, "rainy": 0.68, "foggy": 0.86, "snowy": 0.9}


def light_for(daytime: str, weather: str, rng: np.random.Generator) -> Light:
    """Lighting of a photo, with slightly random exposure and white balance."""
    grey = {"day": 206, "light": 232, "dawn": 168, "dusk": 128, "night": 26}[daytime]
    top, bottom = _CLEAR_SKY[daytime]
    cover = _CLOUD[weather]
    if cover >= 1.0:
        flat = np.full(3, grey) * rng.uniform(0.88, 1.06)
        top = _mix(top, tuple((flat * 0.9).tolist()), 0.85)
        bottom = _mix(bottom, tuple((flat * (0.8 if weather == "rainy" else 1.0)).tolist()), 0.85)
    balance = rng.normal(1.0, 0.03, 3) * rng.uniform(0.9, 1.08) * _DIM.get(weather, 1.0)
    if weather == "sunny":
        balance = balance * (1.1, 1.04, 0.92)
    gain = tuple((np.asarray(_GAIN[daytime]) * balance).tolist())
    return Light(
        gain=gain,
        sky=(top, bottom),
        haze=bottom,
        density=_DENSITY.get(weather, 0.0011) * rng.uniform(0.75, 1.15),
        headlights=0.75 if daytime == "night" else 0.0,
        contrast={"sunny": 1.0, "clear": 0.8, "cloudy": 0.45}.get(weather, 0.2) * (daytime != "night"),
        cloud=cover,
        sun={"sunny": 1.0, "cloudy": 0.3}.get(weather, 0.0) * (daytime != "night"),
    )


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    r, g, blue = (x + (y - x) * share for x, y in zip(a, b, strict=True))
    return r, g, blue
