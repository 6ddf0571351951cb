"""Where on a map of the United States a coordinate lies: d3's ``geoAlbersUsa``.

Three equal-area conic projections (Snyder, "Map projections: a working manual", USGS 1395, p. 98-103):
the lower 48 states, and Alaska (at 0.35 of the scale) and Hawaii as insets below them, as
https://github.com/d3/d3-geo/blob/main/src/projection/albersUsa.js lays them out.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

SCALE, CENTRE_X, CENTRE_Y = 1300.0, 487.5, 305.0
"""Scale and translation of the states in ``assets/us-states.json``."""

VIEW_BOX = (-62.0, 6.0, 1024.0, 606.0)
"""Left, top, width and height of the map in its own units."""


@dataclass(frozen=True)
class ConicPart:
    """One of the three projections, in units of the map's scale.

    Args:
        parallels: the two standard parallels in degrees.
        meridian: central meridian in degrees east.
        centre: longitude relative to the meridian, and latitude, drawn at ``offset``; degrees.
        scale: size relative to the lower 48.
        offset: where the centre lies relative to the map's centre.
        clip: left, top, right, bottom of the part's own rectangle, relative to the map's centre.
    """

    parallels: tuple[float, float]
    meridian: float
    centre: tuple[float, float]
    scale: float
    offset: tuple[float, float]
    clip: tuple[float, float, float, float]

    def project(self, longitude: float, latitude: float) -> tuple[float, float] | None:
        """Position relative to the map's centre (y down), or None outside of the rectangle."""
        x, y = self._raw(longitude - self.meridian, latitude)
        x0, y0 = self._raw(*self.centre)
        x, y = self.offset[0] + self.scale * (x - x0), self.offset[1] - self.scale * (y - y0)
        left, top, right, bottom = self.clip
        return (x, y) if left <= x < right and top <= y < bottom else None

    def _raw(self, longitude: float, latitude: float) -> tuple[float, float]:
        sin_0 = math.sin(math.radians(self.parallels[0]))
        n = (sin_0 + math.sin(math.radians(self.parallels[1]))) / 2
        c = 1 + sin_0 * (2 * n - sin_0)
        rho_0 = math.sqrt(c) / n
        rho = math.sqrt(max(c - 2 * n * math.sin(math.radians(latitude)), 0.0)) / n
        theta = n * math.radians((longitude + 180) % 360 - 180)
        return rho * math.sin(theta), rho_0 - rho * math.cos(theta)


LOWER_48 = ConicPart((29.5, 45.5), -96.0, (-0.6, 38.7), 1.0, (0.0, 0.0), (-0.455, -0.238, 0.455, 0.238))
ALASKA = ConicPart((55.0, 65.0), -154.0, (-2.0, 58.5), 0.35, (-0.307, 0.201), (-0.425, 0.120, -0.214, 0.234))
HAWAII = ConicPart((8.0, 18.0), -157.0, (-3.0, 19.9), 1.0, (-0.205, 0.212), (-0.214, 0.166, -0.115, 0.234))


def albers_usa(
    longitude: float,
    latitude: float,
    scale: float = SCALE,
    translate: tuple[float, float] = (CENTRE_X, CENTRE_Y),
) -> tuple[float, float] | None:
    """Map position of a coordinate.

    Args:
        longitude: degrees east.
        latitude: degrees north.
        scale: units of the map per radian.
        translate: map position of the projection's centre.

    Returns:
        x to the right and y down in units of the map, or None for a place outside the United States'
        rectangle (or not finite).
    """
    if not (math.isfinite(longitude) and math.isfinite(latitude)):
        return None
    for part in (LOWER_48, ALASKA, HAWAII):
        point = part.project(longitude, latitude)
        if point is not None:
            return translate[0] + scale * point[0], translate[1] + scale * point[1]
    return None


@cache
def state_paths() -> tuple[str, str]:
    """SVG path data of the land and of the borders between the states."""
    text = (files("roadwork_dist.evaluation") / "assets" / "us-states.json").read_text()
    shapes = json.loads(text)
    return shapes["land"], shapes["borders"]
