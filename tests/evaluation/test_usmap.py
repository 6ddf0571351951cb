import math
import xml.etree.ElementTree as ElementTree

import pytest

from roadwork_dist.evaluation.usmap import albers_usa, error_map, state_paths

# from the tests of d3-geo, test/projection/albersUsa-test.js (scale 1070, translation 480, 250)
D3_POINTS = [
    ("San Francisco", -122.4194, 37.7749, 107.4, 214.1),
    ("New York", -74.0059, 40.7128, 794.6, 176.5),
    ("Tulsa", -95.9928, 36.1540, 488.8, 298.0),
    ("Anchorage", -149.9003, 61.2181, 171.2, 446.9),
    ("Honolulu", -157.8583, 21.3069, 298.5, 451.0),
]


@pytest.mark.parametrize(("name", "longitude", "latitude", "x", "y"), D3_POINTS)
def test_projection_is_that_of_d3(name: str, longitude: float, latitude: float, x: float, y: float) -> None:
    point = albers_usa(longitude, latitude, scale=1070, translate=(480, 250))
    assert point == pytest.approx((x, y), abs=0.1), name


@pytest.mark.parametrize(
    ("longitude", "latitude"),
    [(2.35, 48.86), (116.4, 39.9), (151.2, -33.9), (-46.6, -23.5), (math.nan, 40.0), (-90.0, math.nan)],
)
def test_places_elsewhere_have_no_position(longitude: float, latitude: float) -> None:
    assert albers_usa(longitude, latitude) is None


def rings(path: str) -> list[list[tuple[float, float]]]:
    out = []
    for piece in path.split("M")[1:]:
        head, _, tail = piece.rstrip("Z").partition("l")
        x, y = map(float, head.split(","))
        points = [(x, y)]
        for step in tail.split():
            cut = step.index("-", 1) if "," not in step else step.index(",")
            x, y = x + float(step[:cut]), y + float(step[cut:].lstrip(","))
            points.append((x, y))
        out.append(points)
    return out


def inside(point: tuple[float, float], ring: list[tuple[float, float]]) -> bool:
    x, y = point
    odd = False
    for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            odd = not odd
    return odd


@pytest.mark.parametrize(
    ("name", "longitude", "latitude", "on_land"),
    [
        ("Denver", -104.99, 39.74, True),
        ("Fairbanks", -147.72, 64.84, True),
        ("middle of Hawaii", -155.5, 19.6, True),
        ("Lake Michigan", -87.0, 43.5, False),
        ("Gulf of Mexico", -90.0, 27.0, False),
        ("tip of Texas", -98.0, 26.4, True),
        ("Monterrey", -100.3, 25.67, False),
    ],
)
def test_cities_fall_on_the_drawn_land(name: str, longitude: float, latitude: float, on_land: bool) -> None:
    point = albers_usa(longitude, latitude)
    assert point is not None
    assert any(inside(point, ring) for ring in rings(state_paths()[0])) is on_land, name


def test_map_counts_what_is_shown_outside_and_unlocated() -> None:
    places = [(41.88, -87.63), (41.88, -87.63), (29.76, -95.37), (48.86, 2.35), (math.nan, math.nan)]
    kinds = ["right", "right", "missed", "false-alarm", "right"]
    drawn = error_map(["a", "b", "<c>", "d", "e"], places, kinds, 'map of "these" <photos>')
    assert (drawn.shown, drawn.unlocated) == (3, 1)
    assert drawn.outside == ["d (48.860, 2.350)"]
    root = ElementTree.fromstring(drawn.svg)
    assert root.get("aria-label") == 'map of "these" <photos>'
    marks = [group.get("class") for group in root.iter("g") if "marker" in str(group.get("class"))]
    assert marks == ["marker right", "marker missed"]  # the two photos at one place share a marker
    assert [title.text for title in root.iter("title")] == ["a: right", "<c>: missed"]
    x, y = albers_usa(-95.37, 29.76) or (0, 0)
    assert f'translate({round(x)} {round(y)})"><g class="marker missed">' in drawn.svg
