"""Draw roadwork devices, signs and workers, in metres."""

import math

import numpy as np

from roadwork_dist.demo.synthetic.sprite import Canvas, Pen
from roadwork_dist.demo.synthetic.view import Colour, Point

WHITE: Colour = (238, 238, 232)
BLACK: Colour = (24, 24, 26)
RUBBER: Colour = (42, 42, 44)
STEEL: Colour = (128, 130, 132)
SKINS: tuple[Colour, ...] = ((236, 196, 166), (198, 146, 110), (134, 92, 66), (92, 62, 46))


def safety_orange(rng: np.random.Generator) -> Colour:
    """Fluorescent orange, faded and dirty to a random degree."""
    return rng.uniform(225, 255), rng.uniform(86, 124), rng.uniform(14, 52)


def machine_paint(rng: np.random.Generator) -> Colour:
    """A yellow or orange of construction machines."""
    if rng.random() < 0.75:
        return rng.uniform(216, 246), rng.uniform(158, 190), rng.uniform(20, 52)
    return rng.uniform(220, 240), rng.uniform(100, 128), rng.uniform(24, 46)


def pick(rng: np.random.Generator, colours: tuple[Colour, ...]) -> Colour:
    """A random one of several colours."""
    return colours[int(rng.integers(len(colours)))]


def cone(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Traffic cone, 0.7 to 0.95 m, with one or two reflective bands."""
    height = rng.uniform(0.7, 0.95)
    half = height * 0.24
    c = pen(height * 0.66, height)
    orange = safety_orange(rng)
    base = RUBBER if rng.random() < 0.5 else tuple(v * 0.82 for v in orange)
    c.box(-height * 0.32, 0, height * 0.32, height * 0.07, base, radius=0.02)  # type: ignore[arg-type]
    bottom, top = height * 0.06, height

    def ring(y0: float, y1: float, colour: Colour) -> None:
        w0, w1 = (half + (0.035 - half) * (y - bottom) / (top - bottom) for y in (y0, y1))
        c.poly([(-w0, y0), (w0, y0), (w1, y1), (-w1, y1)], colour)

    ring(bottom, top, orange)
    ring(height * 0.56, height * 0.76, WHITE)
    if rng.random() < 0.6:
        ring(height * 0.3, height * 0.44, WHITE)
    c.oval(-0.035, top - 0.03, 0.035, top, tuple(v * 0.55 for v in orange))  # type: ignore[arg-type]
    return c


def stripes(c: Canvas, x0: float, x1: float, y0: float, y1: float, colour: Colour, *, pitch: float) -> None:
    """Draw a white board with slanted stripes of ``colour``."""
    c.box(x0, y0, x1, y1, WHITE)
    tall, x = y1 - y0, x0
    while x + pitch / 2 + tall <= x1 + 1e-6:
        c.poly([(x, y0), (x + pitch / 2, y0), (x + pitch / 2 + tall, y1), (x + tall, y1)], colour)
        x += pitch


def barricade(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Type III barricade: three striped boards on two posts, often with warning lamps."""
    width = rng.uniform(1.8, 2.6)
    c = pen(width, 1.72)
    orange = safety_orange(rng)
    for x in (-width * 0.36, width * 0.36):
        c.box(x - 0.04, 0.0, x + 0.04, 1.52, (206, 206, 200))
        c.box(x - 0.2, 0.0, x + 0.2, 0.07, STEEL)
    for y in (0.36, 0.8, 1.24):
        stripes(c, -width / 2, width / 2, y, y + 0.23, orange, pitch=0.42)
    if rng.random() < 0.6:
        for x in (-width * 0.36, width * 0.36):
            c.lamp(x, 1.6, 0.1, (255, 186, 50))
    return c


def water_barrier(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Row of plastic barriers, alternately orange and white."""
    units = int(rng.integers(2, 4))
    c = pen(units * 1.5, 0.95)
    orange = safety_orange(rng)
    for i in range(units):
        x = -units * 0.75 + i * 1.5
        colour = orange if i % 2 == 0 else WHITE
        shade: Colour = tuple(v * 0.78 for v in colour)  # type: ignore[assignment]
        c.poly([(x, 0), (x + 1.48, 0), (x + 1.48, 0.3), (x + 1.3, 0.92), (x + 0.18, 0.92), (x, 0.3)], colour)
        c.box(x, 0, x + 1.48, 0.12, shade)
        c.box(x + 0.3, 0.42, x + 1.18, 0.48, shade)
        c.box(x + 0.34, 0.66, x + 1.14, 0.71, shade)
    return c


def fence(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Orange mesh fence between posts."""
    width, height = rng.uniform(2.5, 4.5), 1.15
    c = pen(width, height)
    orange = safety_orange(rng)
    c.box(-width / 2, 0.14, width / 2, height - 0.1, orange)
    dark: Colour = tuple(v * 0.62 for v in orange)  # type: ignore[assignment]
    for x in np.arange(-width / 2, width / 2, 0.14):
        c.line([(x, 0.14), (x, height - 0.1)], 0.02, dark)
    for y in np.arange(0.14, height - 0.1, 0.14):
        c.line([(-width / 2, y), (width / 2, y)], 0.02, dark)
    for x in np.linspace(-width / 2 + 0.04, width / 2 - 0.04, 3):
        c.box(x - 0.035, 0, x + 0.035, height, (96, 78, 60))
    return c


_WORDS = (
    ("ROAD", "WORK", "AHEAD"),
    ("LANE", "CLOSED", "AHEAD"),
    ("UTILITY", "WORK", "AHEAD"),
    ("WORK", "ZONE"),
)


def _digging_man(c: Canvas, y: float, size: float) -> None:
    def at(*points: Point) -> list[Point]:
        return [(px * size, y + py * size) for px, py in points]

    c.disc(-0.05 * size, y + 0.3 * size, 0.09 * size, BLACK)
    c.line(at((-0.08, 0.2), (-0.16, -0.08)), 0.13 * size, BLACK)
    c.line(at((-0.16, -0.08), (-0.3, -0.36)), 0.09 * size, BLACK)
    c.line(at((-0.14, -0.08), (0.02, -0.36)), 0.09 * size, BLACK)
    c.line(at((-0.08, 0.16), (0.1, -0.02)), 0.07 * size, BLACK)
    c.line(at((-0.06, 0.08), (0.28, -0.24)), 0.045 * size, BLACK)
    c.poly(at((0.12, -0.37), (0.44, -0.37), (0.3, -0.18)), BLACK)


def _arrow(c: Canvas, y: float, size: float) -> None:
    c.poly(
        [(x * size, y + d * size) for x, d in ((-0.36, -0.06), (0.1, -0.06), (0.1, 0.06), (-0.36, 0.06))],
        BLACK,
    )
    c.poly([(x * size, y + d * size) for x, d in ((0.06, -0.2), (0.38, 0.0), (0.06, 0.2))], BLACK)


def diamond(c: Canvas, y: float, half: float, colour: Colour) -> None:
    """Draw a square sign standing on a corner, with a black rim, centred at height ``y``."""
    for radius, ink in ((half, colour), (half * 0.93, BLACK), (half * 0.87, colour)):
        c.poly([(0, y - radius), (radius, y), (0, y + radius), (-radius, y)], ink)


def work_sign(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Orange diamond on a post or a folding stand, with a pictogram or words, or an orange board."""
    half, stand = rng.uniform(0.62, 0.78), rng.random() < 0.5
    middle = half + (rng.uniform(0.35, 0.5) if stand else rng.uniform(1.2, 1.7))
    c = pen(2 * half + 0.04, middle + half)
    orange = safety_orange(rng)
    if stand:
        for x in (-0.5, 0.5):
            c.line([(x, 0.02), (0, middle)], 0.05, STEEL)
    else:
        c.box(-0.04, 0, 0.04, middle, STEEL)
    if rng.random() < 0.18:
        c.box(-half, middle - half * 0.5, half, middle + half * 0.5, BLACK, radius=0.03)
        c.box(-half + 0.03, middle - half * 0.5 + 0.03, half - 0.03, middle + half * 0.5 - 0.03, orange)
        c.text(0, middle + half * 0.18, half * 0.3, "ROAD", BLACK)
        c.text(0, middle - half * 0.2, half * 0.3, "CLOSED", BLACK)
        return c
    diamond(c, middle, half, orange)
    kind = rng.random()
    if kind < 0.45:
        _digging_man(c, middle, half * 1.25)
    elif kind < 0.85:
        words = _WORDS[int(rng.integers(len(_WORDS)))]
        for i, word in enumerate(words):
            c.text(0, middle + half * (0.3 * (len(words) - 1) / 2 - 0.3 * i), half * 0.22, word, BLACK)
    else:
        _arrow(c, middle, half * 1.2)
    return c


def person(
    rng: np.random.Generator,
    c: Canvas,
    *,
    trousers: Colour,
    top: Colour,
    stripe: Colour | None,
    hat: Colour | None,
) -> None:
    """Draw a standing person, 1.78 m tall, in the middle of a canvas 1.3 m wide."""
    skin = pick(rng, SKINS)
    step, lean = rng.uniform(0.06, 0.2), rng.uniform(-0.04, 0.04)
    for side in (-1, 1):
        c.line([(side * 0.09, 0.88), (side * step, 0.06)], 0.17, trousers)
        c.box(side * step - 0.1, 0, side * step + 0.1, 0.1, BLACK, radius=0.03)
    reach = rng.uniform(0.26, 0.5)
    for side in (-1, 1):
        hand = (side * reach, rng.uniform(0.82, 1.15))
        c.line([(side * 0.19 + lean, 1.38), (side * 0.3, 1.12), hand], 0.115, top)
        c.disc(*hand, 0.06, skin)
    c.poly([(-0.2, 0.82), (0.2, 0.82), (0.24 + lean, 1.42), (-0.24 + lean, 1.42)], top)
    if stripe is not None:
        c.box(-0.21, 0.92, 0.21, 0.985, stripe)
        c.box(-0.22, 1.1, 0.22, 1.165, stripe)
        for side in (-1, 1):
            c.box(side * 0.12 - 0.03, 1.16, side * 0.12 + 0.03, 1.42, stripe)
    c.box(-0.05 + lean, 1.4, 0.05 + lean, 1.5, skin)
    c.oval(-0.1 + lean, 1.46, 0.1 + lean, 1.74, skin)
    if hat is None:
        hair = pick(rng, ((40, 30, 24), (92, 64, 40), (150, 120, 80), (70, 70, 72)))
        c.oval(-0.11 + lean, 1.6, 0.11 + lean, 1.77, hair)
    else:
        c.poly(
            [(0.13 * math.cos(a) + lean, 1.63 + 0.15 * math.sin(a)) for a in np.linspace(0, math.pi, 12)], hat
        )
        c.box(-0.16 + lean, 1.62, 0.16 + lean, 1.655, hat)


def worker(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Worker in a hi-vis vest and a helmet, sometimes with a shovel or a STOP or SLOW paddle."""
    c = pen(1.3, 2.15)
    lime: Colour = (rng.uniform(190, 226), rng.uniform(236, 255), rng.uniform(20, 70))
    orange = safety_orange(rng)
    vest, stripe = (lime, (226, 228, 224)) if rng.random() < 0.6 else (orange, (236, 232, 150))
    tool = rng.random()
    if tool < 0.3:
        c.line([(0.5, 0.05), (0.36, 1.4)], 0.045, (140, 104, 62))
        c.poly([(0.42, 0.0), (0.6, 0.0), (0.58, 0.3), (0.44, 0.3)], STEEL)
    trousers = pick(rng, ((46, 56, 84), (60, 58, 54), (90, 82, 66), orange))
    hat = pick(rng, ((244, 206, 40), (240, 240, 236), (236, 120, 30), (60, 110, 190)))
    person(rng, c, trousers=trousers, top=vest, stripe=stripe, hat=hat)
    if tool > 0.8:
        c.line([(0.38, 0.5), (0.38, 1.8)], 0.04, STEEL)
        angles = np.linspace(0, 2 * math.pi, 9) + math.pi / 8
        red = pick(rng, ((200, 30, 36), orange))
        for radius, ink in ((0.25, WHITE), (0.225, red)):
            c.poly([(0.38 + radius * math.cos(a), 1.88 + radius * math.sin(a)) for a in angles], ink)
        c.text(0.38, 1.88, 0.14, "STOP" if red[1] < 60 else "SLOW", WHITE)
    return c


def drum(rng: np.random.Generator, pen: Pen) -> Canvas:
    """Channelizing drum: an orange barrel with two white bands."""
    c = pen(0.68, 1.06)
    orange = safety_orange(rng)
    c.box(-0.33, 0, 0.33, 0.1, RUBBER, radius=0.03)
    for y0, y1, colour in (
        (0.08, 0.3, orange),
        (0.3, 0.46, WHITE),
        (0.46, 0.62, orange),
        (0.62, 0.78, WHITE),
        (0.78, 1.0, orange),
    ):
        w0, w1 = 0.28 - 0.04 * y0, 0.28 - 0.04 * y1
        c.poly([(-w0, y0), (w0, y0), (w1, y1), (-w1, y1)], colour)
    c.oval(-0.24, 0.95, 0.24, 1.04, tuple(v * 0.85 for v in orange))  # type: ignore[arg-type]
    return c
