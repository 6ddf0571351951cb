"""Draw buildings and guard rails along a street."""

from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw

from roadwork_dist.demo.synthetic.street import Street, quad
from roadwork_dist.demo.synthetic.view import Colour, Light, View

_WALLS: dict[str, tuple[Colour, ...]] = {
    "urban": ((152, 96, 78), (176, 168, 156), (122, 130, 140), (196, 180, 152), (98, 104, 112)),
    "commercial": ((196, 186, 168), (166, 110, 90), (210, 204, 196), (128, 134, 138)),
    "residential": ((222, 214, 200), (176, 190, 196), (200, 176, 146), (152, 100, 84), (190, 198, 176)),
    "industrial": ((150, 156, 160), (186, 182, 174), (120, 136, 150), (168, 150, 130)),
    "highway": ((150, 150, 146), (170, 166, 158)),
    "rural": ((150, 54, 46), (206, 200, 188)),
}
_HEIGHTS = {
    "urban": (9, 30),
    "commercial": (5, 10),
    "residential": (5, 8),
    "industrial": (6, 11),
    "highway": (2.2, 2.8),
    "rural": (5, 8),
}
_FREQUENCY = {
    "urban": 0.95,
    "commercial": 0.85,
    "residential": 0.72,
    "industrial": 0.6,
    "highway": 0.0,
    "rural": 0.1,
}


@dataclass(frozen=True)
class _Wall:
    """One building: its long side runs along the road, its short side faces the camera."""

    x: float  # of the side along the road
    depth: float  # away from the road, negative to the left
    near: float
    far: float
    height: float
    colour: Colour
    bay: float
    lit: float  # share of windows with light inside


def draw_roadside(
    draw: ImageDraw.ImageDraw, view: View, light: Light, street: Street, rng: np.random.Generator
) -> None:
    """Draw buildings on both sides, far ones first, and guard rails on highways."""
    walls = []
    for side in (-1, 1):
        edge = street.right + street.verge if side > 0 else street.left - street.verge
        z = rng.uniform(3.5, 10)
        while z < 130:
            length = rng.uniform(8, 20)
            if rng.random() < _FREQUENCY[street.scene]:
                colours = _WALLS[street.scene]
                tint = rng.uniform(0.85, 1.12)
                r, g, b = colours[int(rng.integers(len(colours)))]
                setback = (
                    rng.uniform(0.5, 2.0) if street.scene in ("urban", "commercial") else rng.uniform(3, 9)
                )
                walls.append(
                    _Wall(
                        x=edge + side * setback,
                        depth=side * rng.uniform(8, 14),
                        near=z,
                        far=z + length,
                        height=rng.uniform(*_HEIGHTS[street.scene]),
                        colour=(r * tint, g * tint, b * tint),
                        bay=rng.uniform(2.2, 4.0),
                        lit=rng.uniform(0.2, 0.6) if light.headlights or light.gain[0] < 0.8 else 0.04,
                    )
                )
            z += length + (rng.uniform(0, 1.5) if street.scene == "urban" else rng.uniform(2, 9))
    for wall in sorted(walls, key=lambda w: -w.near):
        _building(draw, view, light, street.scene, wall, rng)
    if street.scene == "highway":
        for x in (street.left - street.verge, street.right + street.verge):
            for near in np.arange(118, 3, -4.0):
                ink = light.shade((168, 170, 172), float(near))
                quad(
                    draw,
                    view,
                    ((x, 0.45, near), (x, 0.8, near), (x, 0.8, near + 4), (x, 0.45, near + 4)),
                    ink,
                )
                quad(
                    draw,
                    view,
                    ((x, 0, near), (x, 0.5, near), (x + 0.12, 0.5, near), (x + 0.12, 0, near)),
                    ink,
                )


def _building(
    draw: ImageDraw.ImageDraw, view: View, light: Light, scene: str, wall: _Wall, rng: np.random.Generator
) -> None:
    x, outer, near, top = wall.x, wall.x + wall.depth, wall.near, wall.height
    toward = 0.72 + 0.2 * (1 - light.contrast)
    quad(
        draw,
        view,
        ((x, 0, near), (outer, 0, near), (outer, top, near), (x, top, near)),
        light.shade(wall.colour, near, toward),
    )
    if scene in ("residential", "rural"):
        ridge, roof = (x + outer) / 2, light.shade((104, 84, 76), near)
        quad(
            draw,
            view,
            ((x, top, near), (outer, top, near), (ridge, top * 1.45, near)),
            light.shade(wall.colour, near, toward * 0.95),
        )
        quad(
            draw,
            view,
            ((x, top, near), (ridge, top * 1.45, near), (ridge, top * 1.45, wall.far), (x, top, wall.far)),
            roof,
        )
    bays = max(1, round((wall.far - near) / wall.bay))
    step = (wall.far - near) / bays
    for i in reversed(range(bays)):
        z0, z1 = near + i * step, near + (i + 1) * step
        quad(draw, view, ((x, 0, z0), (x, 0, z1), (x, top, z1), (x, top, z0)), light.shade(wall.colour, z0))
        _windows(draw, view, light, scene, wall, (z0, z1), rng)
    across = max(1, round(abs(wall.depth) / wall.bay))
    if scene != "industrial":
        _front_windows(draw, view, light, wall, across, toward, rng)
    if scene == "commercial" or (scene == "urban" and rng.random() < 0.5):
        _awning(draw, view, light, wall, rng)


def _glass(light: Light, wall: _Wall, z: float, rng: np.random.Generator) -> tuple[int, int, int]:
    if rng.random() < wall.lit:
        return light.hazed((rng.uniform(226, 255), rng.uniform(190, 224), rng.uniform(110, 160)), z)
    sky = np.asarray(light.sky[1]) * rng.uniform(0.1, 0.38)
    r, g, b = (np.asarray((48.0, 58.0, 68.0)) * np.asarray(light.gain) * 0.7 + sky).tolist()
    return light.hazed((r, g, b), z)


def _windows(
    draw: ImageDraw.ImageDraw,
    view: View,
    light: Light,
    scene: str,
    wall: _Wall,
    span: tuple[float, float],
    rng: np.random.Generator,
) -> None:
    """Draw one bay of windows on the side along the road: a shop or door below, storeys above."""
    z0, z1 = span
    margin = (z1 - z0) * (0.12 if scene == "commercial" else 0.24)
    a, b, x = z0 + margin, z1 - margin, wall.x
    if scene == "industrial":
        rows = [(wall.height * 0.7, wall.height * 0.85)] if rng.random() < 0.6 else [(0.0, 3.2)]
    else:
        ground = (0.2, 2.6) if scene in ("commercial", "urban") else (0.9, 2.2)
        rows = [ground] + [(y + 0.9, y + 2.3) for y in np.arange(3.0, wall.height - 2.6, 3.1)]
    for low, high in rows:
        frame = light.shade(wall.colour, z0, 0.62)
        quad(draw, view, ((x, low, a), (x, low, b), (x, high, b), (x, high, a)), frame)
        inner = (b - a) * 0.06
        glass = _glass(light, wall, z0, rng)
        quad(
            draw,
            view,
            (
                (x, low + 0.08, a + inner),
                (x, low + 0.08, b - inner),
                (x, high - 0.08, b - inner),
                (x, high - 0.08, a + inner),
            ),
            glass,
        )


def _front_windows(
    draw: ImageDraw.ImageDraw,
    view: View,
    light: Light,
    wall: _Wall,
    across: int,
    toward: float,
    rng: np.random.Generator,
) -> None:
    """Draw the windows of the side that faces the camera."""
    step, z = wall.depth / across, wall.near
    for i in range(across):
        a, b = wall.x + step * (i + 0.22), wall.x + step * (i + 0.78)
        for y in np.arange(0.9, wall.height - 1.6, 3.1):
            quad(
                draw,
                view,
                ((a, y - 0.08, z), (b, y - 0.08, z), (b, y + 1.48, z), (a, y + 1.48, z)),
                light.shade(wall.colour, z, toward * 0.75),
            )
            quad(
                draw,
                view,
                ((a, y, z), (b, y, z), (b, y + 1.4, z), (a, y + 1.4, z)),
                _glass(light, wall, z, rng),
            )


_AWNINGS: tuple[Colour, ...] = (
    (232, 112, 30),
    (236, 130, 40),
    (60, 96, 66),
    (150, 36, 40),
    (50, 70, 120),
    (226, 220, 204),
)


def _awning(
    draw: ImageDraw.ImageDraw, view: View, light: Light, wall: _Wall, rng: np.random.Generator
) -> None:
    """Draw awnings above shops; a third of them orange (hard negative)."""
    colour = _AWNINGS[int(rng.integers(len(_AWNINGS)))]
    striped = rng.random() < 0.4
    count = max(2, int((wall.far - wall.near) / 0.8))
    out = -np.sign(wall.depth) * 1.1
    edges = np.linspace(wall.near + 0.4, wall.far - 0.4, count + 1)
    for i in reversed(range(count)):
        z0, z1 = float(edges[i]), float(edges[i + 1])
        ink = light.shade((232, 230, 222) if striped and i % 2 else colour, z0)
        x = wall.x + out
        quad(draw, view, ((wall.x, 3.3, z0), (wall.x, 3.3, z1), (x, 2.6, z1), (x, 2.6, z0)), ink)
        quad(
            draw,
            view,
            ((x, 2.6, z0), (x, 2.6, z1), (x, 2.35, z1), (x, 2.35, z0)),
            light.shade(colour, z0, 0.85),
        )
