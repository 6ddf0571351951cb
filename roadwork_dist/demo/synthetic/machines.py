"""Draw construction vehicles and equipment, in metres; table of the roadwork objects by class."""

import numpy as np

from roadwork_dist.demo.synthetic.objects import (
    BLACK,
    RUBBER,
    STEEL,
    WHITE,
    barricade,
    cone,
    drum,
    fence,
    machine_paint,
    pick,
    safety_orange,
    stripes,
    water_barrier,
    work_sign,
    worker,
)
from roadwork_dist.demo.synthetic.sprite import Canvas, Drawer, Pen
from roadwork_dist.demo.synthetic.view import Colour, Point


def wheel(c: Canvas, x: float, radius: float) -> None:
    """A wheel on the ground, from the side."""
    c.disc(x, radius, radius, RUBBER)
    c.disc(x, radius, radius * 0.5, STEEL)


def excavator(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Tracked excavator from the side, facing left or right."""
    c = pen(7.4, 4.2)
    paint, side = machine_paint(rng), rng.choice((-1.0, 1.0))
    dark: Colour = tuple(v * 0.7 for v in paint)  # type: ignore[assignment]

    def at(*points: Point) -> list[Point]:
        return [(side * x, y) for x, y in points]

    c.box(-side * 3.3, 0, side * 0.5, 0.82, RUBBER, radius=0.4)
    for x in np.linspace(-2.9, 0.1, 5):
        c.disc(side * x, 0.4, 0.26, (84, 84, 84))
    c.poly(at((-3.4, 0.95), (0.6, 0.95), (0.6, 1.5), (-1.0, 1.5), (-1.0, 2.1), (-3.4, 2.1)), paint)
    c.poly(at((-3.4, 0.95), (-2.7, 0.95), (-2.7, 2.1), (-3.4, 2.1)), dark)
    for y in (1.3, 1.5, 1.7):
        c.line(at((-2.4, y), (-1.4, y)), 0.06, dark)
    c.poly(at((-0.9, 1.4), (0.55, 1.4), (0.45, 2.95), (-0.8, 2.95)), paint)
    c.poly(at((-0.7, 1.85), (0.4, 1.85), (0.34, 2.8), (-0.62, 2.8)), (74, 94, 108))
    elbow = (rng.uniform(1.6, 2.2), rng.uniform(3.5, 3.95))
    tip = (rng.uniform(2.8, 3.2), rng.uniform(0.9, 1.9))
    c.line(at((0.3, 1.5), (0.9, 2.9), elbow), 0.42, paint)
    c.line(at(elbow, tip), 0.32, paint)
    c.line(at((0.7, 1.7), (1.3, 3.1)), 0.12, STEEL)
    x, y = tip
    c.poly(
        at(
            (x - 0.3, y + 0.1),
            (x + 0.3, y + 0.2),
            (x + 0.4, y - 0.55),
            (x - 0.1, y - 0.8),
            (x - 0.55, y - 0.3),
        ),
        (70, 66, 60),
    )
    return c


def dump_truck(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Dump truck from the side with a load of earth."""
    c = pen(7.2, 3.3)
    paint, side = machine_paint(rng), rng.choice((-1.0, 1.0))
    cab = paint if rng.random() < 0.5 else pick(rng, (WHITE, (180, 40, 36), (52, 84, 150)))
    dark: Colour = tuple(v * 0.72 for v in paint)  # type: ignore[assignment]

    def at(*points: Point) -> list[Point]:
        return [(side * x, y) for x, y in points]

    c.poly(at((-3.0, 2.5), (-2.0, 3.1), (-0.4, 3.2), (0.9, 2.5)), (112, 88, 62))
    c.poly(at((-3.5, 2.65), (1.2, 2.65), (1.0, 1.2), (-3.0, 1.2)), paint)
    for x in (-2.6, -1.7, -0.8, 0.1):
        c.poly(at((x, 2.6), (x + 0.12, 2.6), (x + 0.12, 1.2), (x, 1.2)), dark)
    c.box(-side * 3.2, 0.85, side * 3.2, 1.15, BLACK)
    c.poly(at((1.4, 0.7), (3.5, 0.7), (3.5, 1.7), (3.1, 2.8), (1.4, 2.8)), cab)
    c.poly(at((2.1, 1.75), (3.3, 1.75), (2.98, 2.6), (2.1, 2.6)), (70, 88, 102))
    for x in (-2.4, -1.3, 2.5):
        wheel(c, side * x, 0.52)
    return c


def roller(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Road roller from the side."""
    c = pen(4.4, 3.0)
    paint, side = machine_paint(rng), rng.choice((-1.0, 1.0))
    c.disc(side * -1.3, 0.75, 0.75, (110, 112, 114))
    c.disc(side * -1.3, 0.75, 0.2, paint)
    wheel(c, side * 1.3, 0.72)
    c.poly(
        [
            (side * x, y)
            for x, y in ((-1.4, 0.9), (2.1, 0.9), (2.1, 1.6), (0.6, 1.7), (-0.2, 1.2), (-1.4, 1.1))
        ],
        paint,
    )
    for x in (-0.6, 0.7):
        c.box(side * x - 0.05, 1.1, side * x + 0.05, 2.8, BLACK)
    c.box(-0.95, 2.76, 0.95, 2.92, paint)
    c.box(side * -0.1, 1.5, side * 0.25, 2.1, (46, 46, 50), radius=0.08)
    return c


def work_truck(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Truck from behind with a striped crash cushion and an arrow of lamps."""
    c = pen(2.6, 3.6)
    body = pick(rng, (WHITE, (236, 176, 40), (230, 120, 40)))
    for x in (-0.85, 0.85):
        c.box(x - 0.25, 0, x + 0.25, 0.9, RUBBER, radius=0.1)
    c.box(-1.2, 0.75, 1.2, 2.3, body, radius=0.06)
    stripes(c, -1.2, 1.2, 0.75, 1.5, safety_orange(rng), pitch=0.7)
    c.box(-1.15, 2.35, 1.15, 3.45, (30, 30, 32))
    _arrow_lamps(c, 2.9, 1.0, rng)
    return c


def _arrow_lamps(c: Canvas, y: float, half: float, rng: np.random.Generator) -> None:
    side, amber = rng.choice((-1.0, 1.0)), (255, 176, 40)
    for x in np.linspace(-0.85, 0.85, 8):
        c.lamp(x * half, y, 0.08 * half, amber)
    for d in (0.16, 0.32):
        for sign in (-1, 1):
            c.lamp(side * (0.85 - d) * half, y + sign * d * half, 0.08 * half, amber)


def arrow_board(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Trailer with a dark panel of amber lamps: an arrow or words."""
    c = pen(2.6, 3.1)
    paint = safety_orange(rng)
    c.box(-0.9, 0.35, 0.9, 0.7, paint, radius=0.05)
    wheel(c, -0.6, 0.33)
    wheel(c, 0.6, 0.33)
    c.box(-0.07, 0.6, 0.07, 1.8, paint)
    c.box(-1.28, 1.65, 1.28, 3.05, paint)
    c.box(-1.2, 1.73, 1.2, 2.97, (26, 26, 28))
    if rng.random() < 0.6:
        _arrow_lamps(c, 2.35, 1.1, rng)
    else:
        words = (("ROAD", "WORK"), ("LEFT LANE", "CLOSED"), ("EXPECT", "DELAYS"))[int(rng.integers(3))]
        for i, word in enumerate(words):
            c.text(0, 2.62 - 0.52 * i, 0.3, word, (255, 180, 50))
    return c


def generator(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Generator on wheels, sometimes with a light tower."""
    tower = rng.random() < 0.5
    c = pen(2.2, 3.9 if tower else 1.5)
    paint = machine_paint(rng) if rng.random() < 0.7 else WHITE
    if tower:
        c.box(-0.05, 1.3, 0.05, 3.6, STEEL)
        c.box(-0.8, 3.5, 0.8, 3.58, STEEL)
        for x in (-0.6, -0.2, 0.2, 0.6):
            c.lamp(x, 3.68, 0.15, (255, 246, 214))
    c.box(-1.0, 0.4, 1.0, 1.42, paint, radius=0.08)
    for y in np.arange(0.65, 1.2, 0.11):
        c.box(-0.8, y, -0.1, y + 0.05, (50, 50, 50))
    c.box(0.2, 0.6, 0.8, 1.2, tuple(v * 0.85 for v in paint))  # type: ignore[arg-type]
    wheel(c, -0.5, 0.3)
    wheel(c, 0.5, 0.3)
    return c


ROADWORK: dict[str, tuple[Drawer, ...]] = {
    "cone": (cone,),
    "barrier": (barricade, water_barrier, fence),
    "sign": (work_sign,),
    "worker": (worker,),
    "vehicle": (excavator, dump_truck, roller, work_truck),
    "equipment": (drum, arrow_board, generator),
}
"""Drawing functions for each class of ``MASK_CLASSES``."""
