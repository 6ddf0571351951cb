import numpy as np
import pandas as pd
import pytest
from support.synthetic_run import CITIES, synthetic_predictions

from roadwork_dist.evaluation.slices import UNKNOWN, gps_clusters, null_patterns, photo_sizes, slice_names


def test_every_property_names_every_photo() -> None:
    frame = synthetic_predictions(60)
    names = slice_names(frame)
    assert list(names) == ["weather", "daytime", "scene", "place", "known metadata", "photo size"]
    assert all(len(column) == 60 for column in names.values())
    assert names["weather"] == [UNKNOWN if w is None else w for w in frame["weather"]]


def test_null_patterns_say_what_is_known() -> None:
    frame = synthetic_predictions(4)
    for field in ("weather", "daytime", "scene", "latitude", "longitude"):
        frame[field] = None if field in ("weather", "daytime", "scene") else np.nan
    frame.loc[1, "weather"] = "sunny"
    frame.loc[2, ["latitude", "longitude"]] = [40.0, -90.0]
    frame.loc[2, "scene"] = "urban"
    frame.loc[3, "latitude"] = 40.0
    assert null_patterns(frame) == ["nothing", "weather", "GPS, scene", "nothing"]


@pytest.mark.parametrize(
    ("width", "height", "name"),
    [
        (224, 224, "below 0.5 Mpx"),
        (1000, 500, "0.5–2 Mpx"),
        (2016, 1512, "2–5 Mpx"),
        (4032, 3024, "from 10 Mpx"),
        (None, 3024, UNKNOWN),
    ],
)
def test_photo_sizes(width: int | None, height: int, name: str) -> None:
    frame = synthetic_predictions(1)
    frame["width"] = pd.array([width], dtype="Int64")
    frame["height"] = pd.array([height], dtype="Int64")
    assert photo_sizes(frame) == [name]


def test_clusters_follow_the_cities() -> None:
    generator = np.random.default_rng(0)
    city = generator.integers(5, size=100)
    coordinates = np.array(CITIES)[city] + generator.normal(size=(100, 2)) * 0.05
    coordinates[3] = [np.nan, -90.0]
    names = gps_clusters(coordinates)
    assert names[3] == UNKNOWN
    by_city = [{names[i] for i in range(100) if i != 3 and city[i] == k} for k in range(5)]
    assert all(len(found) == 1 for found in by_city)
    found = [next(iter(group)) for group in by_city]
    expected = ["Chicago, IL", "Houston, TX", "New York City, NY", "Los Angeles, CA", "Seattle, WA"]
    assert [name.split(" km of ")[1] for name in found] == expected
    assert all(name.startswith("within ") for name in found)


def test_clusters_of_one_place_of_none_and_of_no_city() -> None:
    assert gps_clusters(np.array([[41.88, -87.63]] * 3)) == ["within 10 km of Chicago, IL"] * 3
    assert gps_clusters(np.full((2, 2), np.nan)) == [UNKNOWN] * 2
    assert gps_clusters(np.empty((0, 2))) == []
    assert gps_clusters(np.array([[-33.9, 151.2]])) == ["within 10 km of 33.9° S, 151.2° E"]


def test_two_clusters_around_one_city_have_names_of_their_own() -> None:
    coordinates = np.array([[40.70, -74.00], [40.71, -74.01]])
    assert len(set(gps_clusters(coordinates))) == 2
