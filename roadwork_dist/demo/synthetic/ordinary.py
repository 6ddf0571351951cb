"""Draw ordinary street objects and hard negatives: objects with roadwork's colours or shapes."""

import math

import numpy as np
from PIL import Image

from roadwork_dist.demo.synthetic.objects import (
    BLACK,
    RUBBER,
    STEEL,
    WHITE,
    diamond,
    person,
    pick,
    safety_orange,
)
from roadwork_dist.demo.synthetic.sprite import Canvas, Drawer, Pen, blotches
from roadwork_dist.demo.synthetic.view import Colour

_CAR_PAINTS: tuple[Colour, ...] = (
    (226, 226, 224),
    (40, 42, 46),
    (128, 132, 138),
    (168, 28, 32),
    (36, 62, 120),
    (70, 84, 76),
    (188, 180, 160),
)


def _orange_paint(rng: np.random.Generator) -> Colour:
    return rng.uniform(216, 250), rng.uniform(88, 130), rng.uniform(14, 50)


def _car(rng: np.random.Generator, pen: Pen, paint: Colour, *, facing: bool) -> Canvas:
    tall = rng.uniform(1.42, 1.8)
    c = pen(1.9, tall)
    dark: Colour = tuple(v * 0.72 for v in paint)  # type: ignore[assignment]
    for x in (-0.68, 0.68):
        c.box(x - 0.14, 0, x + 0.14, 0.5, RUBBER, radius=0.05)
    c.poly(
        [(-0.86, 0.85), (0.86, 0.85), (0.66, tall - 0.08), (0.56, tall), (-0.56, tall), (-0.66, tall - 0.08)],
        paint,
    )
    c.poly([(-0.72, 0.95), (0.72, 0.95), (0.58, tall - 0.12), (-0.58, tall - 0.12)], (58, 70, 82))
    c.box(-0.93, 0.26, 0.93, 0.96, paint, radius=0.14)
    c.box(-0.93, 0.26, 0.93, 0.42, dark, radius=0.05)
    for x in (-0.74, 0.74):
        if facing:
            c.lamp(x, 0.72, 0.11, (255, 252, 232))
        else:
            c.box(x - 0.13, 0.62, x + 0.13, 0.86, (150, 18, 20), radius=0.04)
            c.lamp(x, 0.74, 0.05, (236, 40, 40))
    c.box(-0.24, 0.5, 0.24, 0.64, WHITE)
    return c


def car(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Car from behind, any common colour."""
    return _car(rng, pen, pick(rng, _CAR_PAINTS), facing=False)


def oncoming_car(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Car from the front, any common colour."""
    return _car(rng, pen, pick(rng, _CAR_PAINTS), facing=True)


def orange_car(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Hard negative: an orange car."""
    return _car(rng, pen, _orange_paint(rng), facing=rng.random() < 0.3)


def parked_car(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Car from the side in a driveway, sometimes orange or a yellow cab."""
    shade = rng.random()
    paint = (
        _orange_paint(rng)
        if shade < 0.22
        else (240.0, 190.0, 30.0)
        if shade < 0.34
        else pick(rng, _CAR_PAINTS)
    )
    c = pen(4.5, 1.5)
    c.poly([(-1.5, 0.8), (-0.95, 1.45), (0.7, 1.45), (1.35, 0.82)], paint)
    c.poly([(-1.3, 0.86), (-0.86, 1.36), (-0.1, 1.36), (-0.1, 0.86)], (60, 72, 84))
    c.poly([(0.0, 0.86), (0.0, 1.36), (0.62, 1.36), (1.14, 0.86)], (60, 72, 84))
    c.box(-2.2, 0.28, 2.2, 0.88, paint, radius=0.2)
    c.box(-2.2, 0.28, 2.2, 0.4, tuple(v * 0.6 for v in paint), radius=0.05)  # type: ignore[arg-type]
    for x in (-1.35, 1.35):
        c.disc(x, 0.33, 0.33, RUBBER)
        c.disc(x, 0.33, 0.18, STEEL)
    return c


def van(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Delivery van or box truck from behind, sometimes orange or yellow."""
    shade = rng.random()
    paint = (
        _orange_paint(rng) if shade < 0.3 else (236.0, 190.0, 40.0) if shade < 0.4 else pick(rng, _CAR_PAINTS)
    )
    c = pen(2.3, 2.9)
    for x in (-0.8, 0.8):
        c.box(x - 0.18, 0, x + 0.18, 0.6, RUBBER, radius=0.06)
    c.box(-1.12, 0.4, 1.12, 2.88, paint, radius=0.1)
    c.line([(0, 0.6), (0, 2.75)], 0.03, tuple(v * 0.65 for v in paint))  # type: ignore[arg-type]
    c.box(-1.12, 0.4, 1.12, 0.58, BLACK)
    for x in (-1.0, 1.0):
        c.lamp(x, 0.75, 0.07, (220, 36, 36))
    if rng.random() < 0.5:
        c.text(0, 2.0, 0.3, ("FRESH", "PARCEL", "RENTALS")[int(rng.integers(3))], BLACK)
    return c


def school_bus(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Hard negative: a yellow school bus from behind."""
    c = pen(2.6, 3.1)
    yellow: Colour = (rng.uniform(236, 250), rng.uniform(170, 192), 24)
    for x in (-0.85, 0.85):
        c.box(x - 0.2, 0, x + 0.2, 0.7, RUBBER, radius=0.08)
    c.box(-1.26, 0.5, 1.26, 3.05, yellow, radius=0.25)
    c.box(-1.0, 1.75, -0.1, 2.5, (54, 64, 74))
    c.box(0.1, 1.75, 1.0, 2.5, (54, 64, 74))
    for y in (0.75, 1.2, 1.6):
        c.box(-1.26, y, 1.26, y + 0.05, BLACK)
    c.text(0, 2.75, 0.24, "SCHOOL BUS", BLACK)
    for x in (-1.05, 1.05):
        c.lamp(x, 2.72, 0.11, (226, 40, 36))
    return c


def pumpkins(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Hard negative: a pile of pumpkins."""
    c = pen(2.2, 1.0)
    for row, count in ((0, 4), (1, 2)):
        for i in range(count):
            x, y = (i - (count - 1) / 2) * 0.5 + rng.uniform(-0.06, 0.06), 0.26 + row * 0.4
            orange, r = _orange_paint(rng), rng.uniform(0.22, 0.3)
            c.oval(x - r, y - r * 0.8, x + r, y + r * 0.8, orange)
            for k, part in enumerate((0.62, 0.26)):
                ink: Colour = tuple(v * (0.8 + 0.12 * k) for v in orange)  # type: ignore[assignment]
                c.oval(x - r * part, y - r * 0.8, x + r * part, y + r * 0.8, ink)
            c.box(x - 0.03, y + r * 0.7, x + 0.03, y + r * 0.7 + 0.1, (74, 92, 44))
    return c


def stop_sign(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Hard negative: a stop sign."""
    c = pen(0.86, 2.75)
    c.box(-0.035, 0, 0.035, 2.2, STEEL)
    for radius, ink in ((0.42, WHITE), (0.385, (186, 24, 32))):
        angles = np.linspace(0, 2 * math.pi, 9) + math.pi / 8
        c.poly([(radius * math.cos(a), 2.32 + radius * math.sin(a)) for a in angles], ink)
    c.text(0, 2.32, 0.24, "STOP", WHITE)
    return c


def yield_sign(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Hard negative: a yield sign."""
    c = pen(1.0, 2.7)
    c.box(-0.035, 0, 0.035, 2.0, STEEL)
    c.poly([(-0.48, 2.66), (0.48, 2.66), (0, 1.82)], (192, 28, 34))
    c.poly([(-0.27, 2.53), (0.27, 2.53), (0, 2.06)], WHITE)
    return c


def warning_sign(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Hard negative: an ordinary yellow warning diamond."""
    c = pen(1.3, 2.75)
    c.box(-0.04, 0, 0.04, 2.0, STEEL)
    diamond(c, 2.1, 0.62, (rng.uniform(236, 252), rng.uniform(190, 210), rng.uniform(20, 50)))
    kind = rng.integers(3)
    if kind == 0:
        c.line([(-0.1, 1.75), (-0.1, 2.05), (0.12, 2.2), (0.12, 2.42)], 0.09, BLACK)
        c.poly([(-0.02, 2.38), (0.26, 2.38), (0.12, 2.56)], BLACK)
    elif kind == 1:
        c.box(-0.13, 1.72, 0.13, 2.48, BLACK, radius=0.06)
        for y, ink in ((2.34, (200, 40, 40)), (2.1, (240, 190, 40)), (1.86, (40, 160, 70))):
            c.disc(0, y, 0.09, ink)
    else:
        c.text(0, 2.2, 0.2, "DEAD", BLACK)
        c.text(0, 1.96, 0.2, "END", BLACK)
    return c


def plain_sign(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Speed limit or street name sign."""
    c = pen(0.9, 2.7)
    c.box(-0.03, 0, 0.03, 2.6, STEEL)
    if rng.random() < 0.6:
        c.box(-0.32, 1.75, 0.32, 2.62, WHITE, radius=0.05)
        c.text(0, 2.42, 0.13, "SPEED", BLACK)
        c.text(0, 2.02, 0.34, str(rng.choice(("25", "35", "45", "55"))), BLACK)
    else:
        c.box(-0.44, 2.3, 0.44, 2.58, (20, 110, 70), radius=0.03)
        c.text(0, 2.44, 0.15, str(rng.choice(("MAIN", "OAK", "ELM", "PARK"))), WHITE)
    return c


def pedestrian(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Pedestrian; a third of them in an orange or yellow jacket (hard negative)."""
    c = pen(1.3, 1.8)
    top = pick(rng, ((60, 70, 96), (120, 40, 48), (200, 196, 188), (40, 44, 46), (96, 120, 92)))
    if rng.random() < 0.35:
        top = safety_orange(rng) if rng.random() < 0.7 else (236, 214, 60)
    person(
        rng,
        c,
        trousers=pick(rng, ((46, 52, 74), (30, 30, 34), (130, 116, 92))),
        top=top,
        stripe=None,
        hat=None,
    )
    return c


def bin_box(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Litter bin, hydrant or letter box in a strong colour, half of them orange."""
    c = pen(0.7, 1.15)
    ink = (
        _orange_paint(rng) if rng.random() < 0.5 else pick(rng, ((36, 66, 140), (170, 30, 34), (50, 90, 60)))
    )
    c.box(-0.28, 0, 0.28, 0.95, ink, radius=0.05)
    c.box(-0.32, 0.9, 0.32, 1.1, tuple(v * 0.75 for v in ink), radius=0.06)  # type: ignore[arg-type]
    c.box(-0.16, 0.7, 0.16, 0.78, BLACK)
    return c


def awning_stall(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Hard negative: a market stall under an orange or striped awning."""
    c = pen(3.4, 2.7)
    orange = _orange_paint(rng)
    for x in (-1.5, 1.5):
        c.box(x - 0.04, 0, x + 0.04, 2.1, STEEL)
    c.box(-1.45, 0.5, 1.45, 1.0, (150, 116, 78))
    for i in range(9):
        x = -1.3 + i * 0.32
        c.disc(x, 1.06, 0.13, pick(rng, ((226, 120, 30), (190, 40, 36), (110, 150, 50))))
    striped = rng.random() < 0.5
    for i in range(8):
        x = -1.68 + i * 0.42
        ink = WHITE if striped and i % 2 else orange
        c.poly([(x, 2.0), (x + 0.42, 2.0), (x * 0.82 + 0.35, 2.65), (x * 0.82, 2.65)], ink)
        c.disc(x + 0.21, 2.0, 0.2, ink)
    return c


def lamp_post(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Street lamp."""
    c = pen(2.6, 7.2)
    c.line([(-1.1, 0), (-1.1, 6.6), (-0.8, 7.0), (0.9, 7.05)], 0.12, (84, 88, 90))
    c.box(0.5, 6.9, 1.25, 7.06, (70, 72, 76))
    c.lamp(0.9, 6.9, 0.12, (255, 236, 190))
    return c


def _crown(rng: np.random.Generator, c: Canvas, low: float, leaf: Colour) -> None:
    """Draw leaves as thresholded noise inside an oval, lit from above."""
    rows, columns = c.size[1], c.size[0]
    small = 220 / max(rows, columns)
    h, w = max(4, int(rows * min(1, small))), max(4, int(columns * min(1, small)))
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    crown = h * (1 - low / c.height)
    r2 = ((x - w / 2) / (w / 2)) ** 2 + ((y - crown / 2) / (crown / 2)) ** 2
    leafy = blotches(rng, h, w, cells=9) * 0.22 + blotches(rng, h, w, cells=30) * 0.2
    tone = (
        1.05
        - 0.4 * y / max(crown, 1)
        + blotches(rng, h, w, cells=24) * 0.13
        + blotches(rng, h, w, cells=60) * 0.1
    )
    rgba = np.empty((h, w, 4), dtype=np.uint8)
    rgba[..., :3] = np.clip(np.asarray(leaf, dtype=np.float32) * tone[..., None], 0, 255)
    rgba[..., 3] = np.where(r2 + leafy < 0.86, 255, 0)
    layer = Image.fromarray(rgba, "RGBA").resize(c.size, Image.Resampling.BILINEAR)
    c.image.alpha_composite(layer)


def tree(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Tree; one in seven in orange autumn colours (hard negative)."""
    tall = rng.uniform(5.0, 9.0)
    c = pen(tall * rng.uniform(0.55, 0.8), tall)
    trunk: Colour = (92, 74, 58)
    c.poly([(-0.2, 0), (0.2, 0), (0.1, tall * 0.6), (-0.1, tall * 0.6)], trunk)
    for side in (-1, 1):
        c.line([(0, tall * 0.4), (side * tall * 0.16, tall * 0.62)], 0.1, trunk)
    autumn = rng.random()
    leaf = (
        (206.0, 112.0, 36.0)
        if autumn < 0.15
        else (rng.uniform(58, 100), rng.uniform(92, 124), rng.uniform(38, 62))
    )
    _crown(rng, c, tall * rng.uniform(0.22, 0.34), leaf)
    return c


def bush(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Low bush or hedge."""
    c = pen(rng.uniform(1.5, 3.4), rng.uniform(0.8, 1.5))
    _crown(rng, c, 0.0, (rng.uniform(60, 96), rng.uniform(92, 118), rng.uniform(40, 60)))
    return c


HARD_NEGATIVES: tuple[tuple[Drawer, float], ...] = (
    (orange_car, 2.6),
    (parked_car, 1.2),
    (van, 1.2),
    (school_bus, 0.6),
    (pumpkins, 1.4),
    (stop_sign, 1.0),
    (yield_sign, 0.8),
    (warning_sign, 1.4),
    (pedestrian, 1.4),
    (bin_box, 1.0),
    (awning_stall, 1.3),
)
"""Drawing functions with their relative frequencies, used in photos of both classes."""
