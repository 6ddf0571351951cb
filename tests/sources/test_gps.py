import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.experiment import GpsConfig
from roadwork_dist.photos.images import FileImage
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.sources.gps import bracket_weights, gps_weights, haversine_km, nearest_km, sphere_kmeans

KM = 180 / (math.pi * 6371.0088)  # degrees of latitude in a kilometre


def manifest(name: str, coordinates: list[tuple[float, float] | None]) -> Manifest:
    samples = [
        Sample(
            str(i), FileImage(Path()), latitude=pair[0] if pair else None, longitude=pair[1] if pair else None
        )
        for i, pair in enumerate(coordinates)
    ]
    return Manifest(name, tuple(samples))


def north(*kilometres: float | None) -> list[tuple[float, float] | None]:
    """Places so many km north of (40, -75)."""
    return [None if km is None else (40 + km * KM, -75.0) for km in kilometres]


TARGET = manifest("target.csv", north(0, 0))


def test_haversine_against_known_distances() -> None:
    paris, london, auckland = [48.8566, 2.3522], [51.5074, -0.1278], [-36.8485, 174.7633]
    km = haversine_km(np.array([paris, [0, 179.9]]), np.array([london, auckland, [0, -179.9]]))
    assert km[0, 0] == pytest.approx(343.6, abs=0.5)
    assert km[0, 1] == pytest.approx(18_500, rel=0.01)
    assert km[1, 2] == pytest.approx(22.24, abs=0.01)  # 0.2 degrees over the date line
    assert haversine_km(np.array([[90.0, 0]]), np.array([[-90.0, 50]]))[0, 0] == pytest.approx(
        math.pi * 6371.0088
    )


point = st.tuples(st.floats(-90, 90), st.floats(-180, 180))


@given(point, point)
def test_haversine_equals_the_angle_between_vectors(a: tuple[float, float], b: tuple[float, float]) -> None:
    def vector(p: tuple[float, float]) -> np.ndarray:
        lat, lon = map(math.radians, p)
        return np.array([math.cos(lat) * math.cos(lon), math.cos(lat) * math.sin(lon), math.sin(lat)])

    u, v = vector(a), vector(b)
    angle = math.atan2(float(np.linalg.norm(np.cross(u, v))), float(u @ v))
    got = haversine_km(np.array([a]), np.array([b]))[0, 0]
    assert got == pytest.approx(6371.0088 * angle, abs=1e-3)


def test_brackets() -> None:
    distances = np.array([0, 49.9, 50, 199.9, 200, 499.9, 500, 9000, math.nan])
    assert bracket_weights(distances, 5.0).tolist() == [5, 5, 2.5, 2.5, 1, 1, 0.3, 0.3, 1]


def test_kmeans_finds_cities_also_across_the_date_line() -> None:
    generator = np.random.default_rng(0)
    cities = np.array([[40.0, -75.0], [34.0, -118.0], [0.0, 180.0]])
    cloud = np.repeat(cities, 50, axis=0) + generator.normal(0, 0.1, (150, 2))
    cloud[:, 1] = (cloud[:, 1] + 180) % 360 - 180
    centres = sphere_kmeans(np.vstack([cloud, [[math.nan, math.nan]]]), 3, seed=0)
    assert (haversine_km(cities, centres).min(axis=1) < 5).all()
    np.testing.assert_array_equal(centres, sphere_kmeans(cloud, 3, seed=0))
    assert len(sphere_kmeans(np.array([[1.0, 2.0], [1.0, 2.0]]), 5, seed=0)) == 1
    assert np.isnan(nearest_km(np.array([[math.nan, math.nan]]), centres)).all()


def test_weights_and_measured_shares() -> None:
    # 40 rows at 10 km (weight 5), 20 at 70 km (2.5), 20 at 400 km (1), 20 without GPS (1).
    train = manifest("train.csv", north(*[10.0] * 40, *[70.0] * 20, *[400.0] * 20, *[None] * 20))
    weights, report = gps_weights(train, TARGET, GpsConfig(), seed=1)
    assert weights.dtype == torch.float64
    assert weights.tolist() == [5.0] * 40 + [2.5] * 20 + [1.0] * 40
    mass = np.array([200, 50, 20])
    assert report.share_50km == pytest.approx(200 / 270, abs=0.015)
    assert report.share_100km == pytest.approx(250 / 270, abs=0.01)
    assert report.mean_km == pytest.approx(mass @ [10, 70, 400] / 270, rel=0.05)
    assert report.share_without_gps == pytest.approx(20 / 290, abs=0.01)
    assert report.draws >= 20_000
    assert report.reason == ""
    text = "\n".join(report.lines())
    assert "40.00 -75.00" in text
    assert "within 100 km 9" in text
    again, same = gps_weights(train, TARGET, GpsConfig(), seed=1)
    assert torch.equal(weights, again)
    assert same == report


@pytest.mark.parametrize(
    ("far", "wanted", "near_weight", "weight_near", "weight_middle"),
    # 10 rows at 10 km, 10 at 150 km, `far` at 300 km: share within 100 km = 10 w / (10 w + 10 m + far)
    [
        (20, 0.50, 5.0, 5.0, 2.5),  # 53 % at once
        (55, 0.42, 5.0, 7.5, 3.75),  # 38 % -> 45 %
        (75, 0.42, 5.0, 10.0, 5.0),  # 33 % -> 40 % -> 44 %
        (80, 0.45, 7.5, 10.0, 10 / 3),  # 42 % -> 47 %
    ],
)
def test_near_weights_are_raised_stepwise_and_that_is_said(
    far: int, wanted: float, near_weight: float, weight_near: float, weight_middle: float
) -> None:
    train = manifest("train.csv", north(*[10.0] * 10, *[150.0] * 10, *[300.0] * far))
    config = GpsConfig(min_share_100km=wanted, near_weight=near_weight)
    weights, report = gps_weights(train, TARGET, config, seed=0)
    assert weights[0] == weight_near
    assert weights[10] == pytest.approx(weight_middle)
    assert weights[20:].eq(1).all()
    assert report.near_weight == weight_near
    assert report.share_100km >= wanted
    raised = weight_near != near_weight
    assert ("raised from" in report.reason) is raised
    assert any("raised from" in line for line in report.lines()) is raised


def test_a_shortfall_stops_unless_told_to_go_on() -> None:
    train = manifest("train.csv", north(*[10.0] * 2, *[300.0] * 98))
    with pytest.raises(
        DataError, match=r"train.csv: too few photos near .* within 100 km 1\d\.\d%.*near weight 10"
    ):
        gps_weights(train, TARGET, GpsConfig(), seed=0)
    weights, report = gps_weights(train, TARGET, GpsConfig(on_shortfall="continue"), seed=0)
    assert weights[0] == 10
    assert "still below 70% within 100 km; continuing" in report.reason


@pytest.mark.parametrize(
    ("train", "target", "config", "said"),
    [
        (north(1), None, GpsConfig(), "no target set"),
        (north(1), manifest("target.csv", north(None)), GpsConfig(), "target.csv has no coordinates"),
        (north(None, None), TARGET, GpsConfig(), "train.csv has no coordinates"),
        (north(1), TARGET, GpsConfig(enabled=False), "gps.enabled is false"),
    ],
)
def test_nothing_to_weight_by_is_uniform_and_said(
    train: list[tuple[float, float] | None], target: Manifest | None, config: GpsConfig, said: str
) -> None:
    weights, report = gps_weights(manifest("train.csv", train), target, config, seed=0)
    assert weights.tolist() == [1.0] * len(train)
    assert not report.weighted
    (line,) = report.lines()
    assert said in line
