"""Cross-section of a street, and drawing of its flat surfaces."""

from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw

from roadwork_dist.demo.synthetic.view import Colour, View


@dataclass(frozen=True)
class Street:
    """Cross-section of a street in metres from the camera, and the style of its sides."""

    scene: str
    left: float  # edge of the roadway, < 0
    right: float
    lanes: tuple[float, ...]  # borders between lanes
    centre_line: float  # border between the two directions
    verge: float  # width of pavement or shoulder beyond each edge
    paved: bool  # pavement with a kerb, else a shoulder and grass
    dry: bool  # sandy instead of green


def random_street(rng: np.random.Generator, scene: str, dry: bool) -> Street:
    """A random street for a scene; the camera is in the middle of its own lane."""
    lane = 3.6 if scene == "highway" else 3.3
    beyond, beside = 1, int(rng.random() < 0.35)
    if scene in ("highway", "urban", "commercial"):
        beyond, beside = int(rng.integers(1, 3)), int(rng.integers(0, 2))
    left, right = -lane * (beyond + 0.5), lane * (beside + 0.5)
    lanes = tuple(float(x) for x in np.arange(left + lane, right - 0.1, lane))
    return Street(
        scene=scene,
        left=left,
        right=right,
        lanes=lanes,
        centre_line=-lane / 2,
        verge=rng.uniform(2.6, 4.0),
        paved=scene not in ("highway", "rural"),
        dry=dry,
    )


def quad(
    draw: ImageDraw.ImageDraw, view: View, corners: tuple[tuple[float, float, float], ...], ink: Colour
) -> None:
    """Fill a polygon with corners (x, y, z) in metres."""
    draw.polygon([view.pixel(*corner) for corner in corners], fill=(int(ink[0]), int(ink[1]), int(ink[2])))
