"""Place the objects of a photo: traffic, street furniture, hard negatives and, in positives, a work zone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from roadwork_dist.config.batch import MASK_CLASSES
from roadwork_dist.demo.synthetic import ordinary
from roadwork_dist.demo.synthetic.machines import ROADWORK
from roadwork_dist.demo.synthetic.objects import cone, drum, work_sign
from roadwork_dist.demo.synthetic.sprite import Drawer
from roadwork_dist.demo.synthetic.street import Street

TINY_SHARE = 0.05
"""Share of positives with a distant work zone only; its cones are about 25 px high in a 4032-px photo."""


@dataclass(frozen=True)
class Thing:
    """One object on the ground: drawing function, position in metres and mask class (-1 = none)."""

    draw: Drawer
    x: float
    z: float
    mask_class: int = -1


def _things(drawers: dict[str, tuple[Drawer, ...]]) -> Iterator[tuple[Drawer, int]]:
    for name, choices in drawers.items():
        for drawer in choices:
            yield drawer, MASK_CLASSES.index(name)


_CLASS_OF: dict[Drawer, int] = dict(_things(ROADWORK))


def _work(draw: Drawer, x: float, z: float) -> Thing:
    return Thing(draw, float(x), float(z), _CLASS_OF[draw])


def _one(rng: np.random.Generator, name: str) -> Drawer:
    choices = ROADWORK[name]
    return choices[int(rng.integers(len(choices)))]


def _taper(rng: np.random.Generator, edge: float, toward: float, z: float) -> list[Thing]:
    """Cones or drums that close a lane, a sign in front and often a vehicle behind."""
    device: Drawer = cone if rng.random() < 0.65 else drum
    count, gap = int(rng.integers(4, 9)), rng.uniform(1.8, 3.6)
    shift = rng.uniform(1.2, 3.0)
    row = [_work(device, edge + toward * shift * i / count, z + gap * i) for i in range(count)]
    row.append(_work(work_sign, edge - toward * rng.uniform(0.6, 1.6), z + rng.uniform(-2, 4)))
    if rng.random() < 0.6:
        row.append(
            _work(_one(rng, "vehicle"), edge - toward * rng.uniform(0, 1.5), z + gap * count * 0.8 + 4)
        )
    if rng.random() < 0.5:
        row.append(_work(_one(rng, "worker"), edge, z + gap * rng.uniform(1, count)))
    return row


def _site(rng: np.random.Generator, edge: float, toward: float, z: float) -> list[Thing]:
    """Barriers with workers and a machine behind them."""
    barrier = _one(rng, "barrier")
    row = [
        _work(barrier, edge + toward * rng.uniform(-0.3, 0.6), z + 2.6 * i)
        for i in range(int(rng.integers(2, 4)))
    ]
    row += [
        _work(_one(rng, "worker"), edge - toward * rng.uniform(-1.2, 1.5), z + rng.uniform(1, 8))
        for _ in range(int(rng.integers(1, 4)))
    ]
    row.append(_work(_one(rng, "vehicle"), edge - toward * rng.uniform(0.0, 1.8), z + rng.uniform(6, 14)))
    row += [
        _work(cone, edge + toward * rng.uniform(0.8, 1.6), z + rng.uniform(-2, 8))
        for _ in range(int(rng.integers(1, 4)))
    ]
    if rng.random() < 0.5:
        row.append(_work(work_sign, edge - toward * rng.uniform(0.5, 1.5), z - 1.5))
    return row


def _kerbside(rng: np.random.Generator, edge: float, toward: float, z: float) -> list[Thing]:
    """Small roadworks at the kerb: drums and cones, a sign, equipment, often one worker."""
    row = [
        _work(drum if rng.random() < 0.5 else cone, edge + toward * rng.uniform(-0.5, 1.2), z + 1.6 * i)
        for i in range(int(rng.integers(3, 6)))
    ]
    row.append(_work(_one(rng, "equipment"), edge - toward * rng.uniform(0, 1.2), z + rng.uniform(3, 8)))
    row.append(_work(work_sign, edge - toward * rng.uniform(0.2, 1.2), z - rng.uniform(0, 2)))
    if rng.random() < 0.6:
        row.append(_work(_one(rng, "worker"), edge, z + rng.uniform(1, 5)))
    return row


_ZONES: tuple[Callable[[np.random.Generator, float, float, float], list[Thing]], ...] = (
    _taper,
    _site,
    _kerbside,
)


def _work_zone(rng: np.random.Generator, street: Street) -> list[Thing]:
    """One work zone at an edge of the roadway, 7 to 12 m away, or a distant one."""
    right = rng.random() < 0.68
    edge, toward = (street.right - 0.3, -1.0) if right else (street.left + 0.3, 1.0)
    if rng.random() < TINY_SHARE:
        return [
            _work(cone, edge + toward * rng.uniform(0, 1.2), z)
            for z in np.linspace(rng.uniform(50, 60), 88, 5)
        ]
    z = 7.0 * (12.0 / 7.0) ** rng.random()
    if not right:
        z += max(0.0, -street.left - 5.0)
    return _ZONES[int(rng.integers(len(_ZONES)))](rng, edge, toward, z)


def _hard_negatives(rng: np.random.Generator, street: Street, count: int, near: float) -> list[Thing]:
    drawers = [d for d, _ in ordinary.HARD_NEGATIVES]
    share = np.array([w for _, w in ordinary.HARD_NEGATIVES])
    things = []
    for index in rng.choice(len(drawers), size=count, p=share / share.sum()):
        draw = drawers[int(index)]
        z = near * (4.0 ** rng.random())
        right = rng.random() < 0.6
        if draw in (ordinary.orange_car, ordinary.van, ordinary.school_bus):
            x, z = (0.0, z + 4) if right else ((street.left + street.centre_line) / 2, z + 4)
        elif draw is ordinary.parked_car:
            x = street.right + street.verge + 3.2 if right else street.left - street.verge - 3.2
        else:
            x = (
                street.right + rng.uniform(0.6, street.verge - 0.4)
                if right
                else street.left - rng.uniform(0.6, street.verge - 0.4)
            )
        things.append(Thing(draw, float(x), float(z)))
    return things


def _ordinary_things(rng: np.random.Generator, street: Street) -> list[Thing]:
    """Traffic, trees, lamp posts, signs and passers-by of an ordinary street."""
    things = []
    for _ in range(int(rng.integers(0, 4))):
        ahead = rng.random() < 0.5
        draw = ordinary.car if ahead else ordinary.oncoming_car
        lane = 0.0 if ahead else (street.left + street.centre_line) / 2
        things.append(Thing(draw, lane, float(rng.uniform(16, 80))))
    trees = {"urban": 3, "commercial": 3, "residential": 9, "rural": 12, "highway": 7, "industrial": 3}[
        street.scene
    ]
    for _ in range(int(rng.poisson(trees))):
        side = rng.choice((-1, 1))
        edge = street.right if side > 0 else -street.left
        away = street.verge + rng.uniform(0.4, 1.0 if street.paved else 9.0)
        draw = ordinary.tree if rng.random() < 0.7 else ordinary.bush
        things.append(Thing(draw, float(side * (edge + away)), float(rng.uniform(9, 95))))
    if street.scene != "rural":
        start, gap = rng.uniform(8, 20), rng.uniform(22, 35)
        things += [Thing(ordinary.lamp_post, street.right + 0.7, float(start + gap * i)) for i in range(3)]
    for _ in range(int(rng.poisson(0.8))):
        x = street.right + rng.uniform(0.5, 1.8)
        things.append(Thing(ordinary.plain_sign, float(x), float(rng.uniform(9, 45))))
    if street.paved:
        for _ in range(int(rng.poisson(0.8))):
            x = street.right + rng.uniform(0.6, street.verge)
            things.append(Thing(ordinary.pedestrian, float(x), float(rng.uniform(9, 40))))
    return things


def arrange(rng: np.random.Generator, street: Street, label: int) -> list[Thing]:
    """All objects of a photo, farthest first (painter's order).

    Photos without roadwork get more and closer hard negatives, so that the amount of orange says
    little about the label.
    """
    things = _ordinary_things(rng, street)
    if label:
        zone = _work_zone(rng, street)
        nearest = min(t.z for t in zone)
        clear = [t for t in things if t.z > nearest or abs(t.x) > 6]
        things = clear + zone + _hard_negatives(rng, street, int(rng.poisson(1.0)), near=nearest + 3)
    else:
        things += _hard_negatives(rng, street, 1 + int(rng.poisson(1.9)), near=5.5)
    return sorted(things, key=lambda t: (-t.z, t.x))
