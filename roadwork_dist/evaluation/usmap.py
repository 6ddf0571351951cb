"""Projects coordinates onto a map of the United States (d3's ``geoAlbersUsa``) and draws errors on it.

Three equal-area conic projections (Snyder, "Map projections: a working manual", USGS 1395, p. 98-103):
the lower 48 states, and Alaska (at 0.35 of the scale) and Hawaii as insets below them, as
https://github.com/d3/d3-geo/blob/main/src/projection/albersUsa.js lays them out.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from markupsafe import Markup, escape

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
        offset: position of the centre relative to the map's centre.
        clip: left, top, right, bottom of the part's rectangle, relative to the map's centre.
    """

    parallels: tuple[float, float]
    meridian: float
    centre: tuple[float, float]
    scale: float
    offset: tuple[float, float]
    clip: tuple[float, float, float, float]

    def project(self, longitude: float, latitude: float) -> tuple[float, float] | None:
        """Position relative to the map's centre (y down), or None outside the rectangle."""
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
        x to the right and y down in units of the map, or None if the coordinate is outside the map or not
        finite.
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


@dataclass(frozen=True)
class ErrorMap:
    """A map of right and wrong predictions, and the photos that are not on it."""

    svg: Markup
    shown: int
    unlocated: int
    outside: list[str]


KINDS = ("right", "false-alarm", "missed")
"""CSS classes of the markers, in drawing order."""

SHAPES = {
    "right": '<circle r="5"/>',
    "false-alarm": '<path d="M0,-9L8,6L-8,6Z"/>',
    "missed": '<path d="M0,-9L8,0L0,9L-8,0Z"/>',
}
"""Marker shapes; they differ as well as the colours."""

MOST_RIGHT = 1500
"""Maximum number of right predictions drawn; all errors are drawn."""


def error_map(
    ids: Sequence[str], places: Sequence[tuple[float, float]], kinds: Sequence[str], title: str
) -> ErrorMap:
    """Draw photos on the map of the United States.

    Args:
        ids: name of each photo.
        places: latitude and longitude in degrees, NaN where unknown.
        kinds: one of :data:`KINDS` for each photo.
        title: description of the map, for screen readers.
    """
    markers: dict[str, dict[tuple[int, int], str]] = {kind: {} for kind in KINDS}
    outside, unlocated = [], 0
    for name, (latitude, longitude), kind in zip(ids, places, kinds, strict=True):
        point = albers_usa(longitude, latitude)
        if not (math.isfinite(latitude) and math.isfinite(longitude)):
            unlocated += 1
        elif point is None:
            outside.append(f"{name} ({latitude:.3f}, {longitude:.3f})")
        elif kind != "right" or len(markers[kind]) < MOST_RIGHT:
            # photos of one kind on one px share a marker, which keeps the page small
            markers[kind].setdefault((round(point[0]), round(point[1])), name)
    drawn = "".join(
        f'<g transform="translate({x} {y})"><g class="marker {kind}">{SHAPES[kind]}'
        f"<title>{escape(name)}: {kind.replace('-', ' ')}</title></g></g>"
        for kind in KINDS
        for (x, y), name in markers[kind].items()
    )
    land, borders = state_paths()
    left, top, width, height = VIEW_BOX
    svg = Markup(
        f'<svg class="map" viewBox="{left:g} {top:g} {width:g} {height:g}" role="img" '
        f'aria-label="{escape(title)}"><path class="land" d="{land}"/>'
        f'<path class="borders" d="{borders}"/>{drawn}</svg>'
    )
    return ErrorMap(svg, len(ids) - unlocated - len(outside), unlocated, outside)
