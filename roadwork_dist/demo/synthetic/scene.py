"""Paint the background of a street scene: sky, horizon, ground, lane marks and buildings."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from roadwork_dist.demo.synthetic.buildings import draw_roadside
from roadwork_dist.demo.synthetic.sprite import blotches, fractal
from roadwork_dist.demo.synthetic.street import Street, quad
from roadwork_dist.demo.synthetic.view import Colour, Light, View

_BASE_WIDTH = 1008
"""Sky and ground are computed at this width and scaled up; edges are drawn at the full size."""

Floats = NDArray[np.float32]


def paint_background(
    view: View, light: Light, street: Street, weather: str, rng: np.random.Generator
) -> Image.Image:
    """RGB picture of the street at the view's full size, without objects."""
    shrink = max(1.0, view.width / _BASE_WIDTH)
    small = replace(
        view,
        width=round(view.width / shrink),
        height=round(view.height / shrink),
        focal=view.focal / shrink,
        centre=view.centre / shrink,
        horizon=view.horizon / shrink,
    )
    base = np.empty((small.height, small.width, 3), dtype=np.float32)
    line = int(np.ceil(small.horizon))
    base[:line] = _sky(small, line, light, rng)
    _skyline(base[:line], street, light, rng)
    base[line:] = _ground(small, line, light, street, weather, rng)
    picture = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8))
    if picture.size != (view.width, view.height):
        picture = picture.resize((view.width, view.height), Image.Resampling.BICUBIC)
    _grain(picture, view, rng)
    draw = ImageDraw.Draw(picture)
    _lane_marks(draw, view, light, street, weather, rng)
    draw_roadside(draw, view, light, street, rng)
    return picture


def _sky(view: View, rows: int, light: Light, rng: np.random.Generator) -> Floats:
    top, bottom = (np.asarray(c, dtype=np.float32) for c in light.sky)
    down = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None] ** np.float32(1.4)
    sky = np.repeat(top + (bottom - top) * down, view.width, axis=1)
    shapes = fractal(rng, 3 * rows, view.width, cells=7, octaves=5)[
        ::3
    ]  # flattened, as clouds seen from the side
    amount = np.clip((shapes + (light.cloud - 0.5) * 3.0) * 0.8, 0, 1)[..., None]
    bright = 0.72 * bottom + 0.28 * np.asarray(light.gain, dtype=np.float32) * 245
    tone = 1 + 0.07 * fractal(rng, rows, view.width, cells=8, octaves=4)[..., None]
    sky = sky + _sun_glow(rows, view.width, light, rng)
    clouded: Floats = sky * (1 - amount) + bright * tone * amount
    return clouded


def _sun_glow(rows: int, columns: int, light: Light, rng: np.random.Generator) -> Floats:
    """[rows, columns, 3] light to add around the sun."""
    x, y = rng.uniform(0.1, 0.9) * columns, rng.uniform(0.1, 0.6) * rows
    down, across = np.mgrid[0:rows, 0:columns].astype(np.float32)
    distance = np.hypot(across - np.float32(x), down - np.float32(y)) / np.float32(columns)
    glow = 300 * np.exp(-((distance / 0.022) ** 2)) + 110 * np.exp(-distance / 0.09)
    added: Floats = (light.sun * glow)[..., None] * np.asarray((1.0, 0.94, 0.78), dtype=np.float32)
    return added


def _skyline(sky: Floats, street: Street, light: Light, rng: np.random.Generator) -> None:
    """Draw hills, a line of trees or distant towers in front of the sky, in place."""
    rows, columns = sky.shape[:2]
    haze = np.asarray(light.haze, dtype=np.float32)
    for share, tint in ((0.16, 0.3), (0.09, 0.55)):
        if street.scene in ("urban", "commercial", "industrial") and share > 0.1:
            steps = rng.uniform(0.05, 1.0, 1 + columns // 22).repeat(22)[:columns]
            outline, own = steps * share * 1.3, (112.0, 116.0, 126.0)
        else:
            wave = blotches(rng, 2, columns, cells=6)[0] * 0.5 + blotches(rng, 2, columns, cells=90)[0] * 0.09
            outline = (wave * 0.5 + 0.6) * share
            own = (126.0, 112.0, 88.0) if street.dry else (64.0, 84.0, 58.0)
        edge = rows * (1 - outline)
        behind = np.arange(rows)[:, None] >= edge[None, :]
        shown = tint * light.fade(120.0)
        colour = np.asarray(own, dtype=np.float32) * np.asarray(light.gain, dtype=np.float32)
        sky[behind] = (haze * (1 - shown) + colour * shown)[None]


def _ground(
    view: View, line: int, light: Light, street: Street, weather: str, rng: np.random.Generator
) -> Floats:
    below = np.arange(line, view.height, dtype=np.float32) + np.float32(0.5)
    z = (view.focal * view.eye / np.maximum(below - view.horizon, 0.25)).astype(np.float32)[:, None]
    columns = np.arange(view.width, dtype=np.float32)[None, :] + np.float32(0.5)
    x = (columns - view.centre) * z / view.focal - np.float32(0.5 * view.bend) * z * z
    road = (x > street.left) & (x < street.right)
    verge = ~road & (x > street.left - street.verge) & (x < street.right + street.verge)
    colours = _ground_colours(street, rng)
    base = np.where(
        road[..., None], colours["road"], np.where(verge[..., None], colours["verge"], colours["land"])
    )
    texture, coarse = _texture(x, z, rng)
    fade = np.minimum(1.0, 14.0 / z)
    amount = np.where(road, 0.05, np.where(verge, 0.05, 0.16)).astype(np.float32)
    worn = np.exp(-(((np.abs(x - np.round(x / 3.4) * 3.4) - 0.8) / 0.35) ** 2)) * road
    blotched = np.where(road, 0.018, np.where(verge, 0.02, 0.08)).astype(np.float32)
    surface = base * (1 + amount * texture * fade + blotched * coarse - 0.07 * worn)[..., None]
    if street.paved:
        joints = verge & (np.mod(z, 1.6) < 0.05) & (z < 30)
        kerb = (np.abs(x - street.left) < 0.12) | (np.abs(x - street.right) < 0.12)
        surface = np.where(joints[..., None], surface * 0.8, surface)
        surface = np.where(kerb[..., None], np.float32(172), surface)
    lit = _weathered(surface, x, z, road, coarse, light, weather)
    t = np.exp(-np.float32(light.density) * z)[..., None]
    hazed: Floats = lit * t + np.asarray(light.haze, dtype=np.float32) * (1 - t)
    return hazed


def _ground_colours(street: Street, rng: np.random.Generator) -> dict[str, Floats]:
    grey = rng.uniform(74, 122)
    road = (grey, grey, grey * 1.02)
    land = (176.0, 152.0, 112.0) if street.dry else (96.0, 118.0, 62.0)
    verge = (164.0, 160.0, 152.0) if street.paved else (grey * 1.15, grey * 1.1, grey)
    if street.scene == "industrial":
        land = (142.0, 136.0, 126.0)
    tone = rng.uniform(0.86, 1.1, 3)
    return {
        name: (np.asarray(colour) * tone[i]).astype(np.float32)
        for i, (name, colour) in enumerate((("road", road), ("verge", verge), ("land", land)))
    }


def _texture(x: Floats, z: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Fine and coarse noise in ground coordinates, two [rows, columns] arrays."""
    side = 512
    tile = rng.standard_normal((side, side), dtype=np.float32)
    tile = (tile + np.roll(tile, 1, 0) + np.roll(tile, 1, 1)) * np.float32(0.6)
    rough = fractal(rng, side // 2, side // 2, cells=10, octaves=4)
    rough = np.block([[rough, rough[:, ::-1]], [rough[::-1], rough[::-1, ::-1]]])  # so that it tiles
    across, along = x + 400, np.broadcast_to(z, x.shape)  # positive: astype truncates towards 0
    fine = tile[(along * 22).astype(np.int32) % side, (across * 22).astype(np.int32) % side]
    return fine, rough[(along * 7).astype(np.int32) % side, (across * 16).astype(np.int32) % side]


def _weathered(
    surface: Floats, x: Floats, z: Floats, road: NDArray[np.bool_], coarse: Floats, light: Light, weather: str
) -> Floats:
    """The lit ground; rain makes it shine, snow covers it except for the wheel tracks."""
    if weather == "snowy":
        tracks = road & (np.abs(np.abs(x - np.round(x / 3.4) * 3.4) - 0.8) < 0.45)
        cover = np.clip(0.75 + 0.35 * coarse, 0, 1) * np.where(tracks, 0.25, np.where(road, 0.7, 1.0))
        surface = surface * (1 - cover[..., None]) + np.float32(236) * cover[..., None]
    beam = light.headlights * np.exp(-((x / (2.2 + 0.16 * z)) ** 2) - ((z - 11.0) / 15.0) ** 2)
    lit = surface * (np.asarray(light.gain, dtype=np.float32) + 0.9 * beam[..., None].astype(np.float32))
    if weather == "rainy":
        puddles = np.clip(1.4 * coarse - 0.8, 0, 1)
        shine = np.clip(0.12 + z / 90.0 + 0.28 * puddles, 0, 0.6) * np.where(road, 1.0, 0.4)
        mirror = np.asarray(light.sky[1], dtype=np.float32)
        lit = lit * 0.8 * (1 - shine[..., None]) + mirror * shine[..., None]
    wet_or_dry: Floats = lit.astype(np.float32)
    return wet_or_dry


def _grain(picture: Image.Image, view: View, rng: np.random.Generator) -> None:
    """Add the grain of asphalt and grass at full resolution, coarser close to the camera, in place."""
    top = int(view.horizon) + 1
    tile = rng.normal(128, 5.5, (512, 512)).astype(np.uint8)
    middle = top + (view.height - top) // 3
    for start, stop, zoom in ((top, middle, 1), (middle, view.height, 2)):
        stamp = Image.fromarray(tile).resize((512 * zoom, 512 * zoom)).convert("RGB")
        box = (0, start, view.width, stop)
        add_everywhere(picture, stamp, box)


def add_everywhere(picture: Image.Image, stamp: Image.Image, box: tuple[int, int, int, int]) -> None:
    """Add a tiled stamp (128 = no change) over a box of a picture, in place."""
    width, height = box[2] - box[0], box[3] - box[1]
    plane = Image.new("RGB", (width, height))
    for y in range(0, height, stamp.height):
        for x in range(0, width, stamp.width):
            plane.paste(stamp, (x, y))
    part = picture.crop(box)
    picture.paste(ImageChops.add(part, plane, 1.0, -128), box)


def _strip(
    draw: ImageDraw.ImageDraw, view: View, x: float, near: float, far: float, width: float, ink: Colour
) -> None:
    """Draw a painted line on the ground."""
    half = width / 2
    quad(draw, view, ((x - half, 0, near), (x + half, 0, near), (x + half, 0, far), (x - half, 0, far)), ink)


def _lane_marks(
    draw: ImageDraw.ImageDraw,
    view: View,
    light: Light,
    street: Street,
    weather: str,
    rng: np.random.Generator,
) -> None:
    white, yellow = (214.0, 214.0, 208.0), (216.0, 168.0, 52.0)
    worn = rng.uniform(0.7, 1.0) * (0.8 if weather in ("snowy", "rainy") else 1.0)
    offset = rng.uniform(0, 12)
    lines: list[tuple[float, bool, Colour]] = [
        (x, True, white) for x in street.lanes if x != street.centre_line
    ]
    lines += [(street.centre_line - 0.12, False, yellow), (street.centre_line + 0.12, False, yellow)]
    if not street.paved:
        lines += [(street.left + 0.25, False, white), (street.right - 0.25, False, white)]
    for x, dashed, colour in lines:
        gap, length, start = (12.0, 3.2, -offset) if dashed else (4.0, 4.0, 2.0)
        for begin in np.arange(start, 110, gap).tolist():
            near, far = begin, begin + length
            if far > 2.2:
                near = max(near, 1.6)
                _strip(draw, view, x, near, far, 0.13, light.shade(colour, near, worn))
