"""Sampling weights that favour training photos taken near the locations of the target set.

Distances are great-circle distances (haversine) on a sphere with the Earth's mean radius. Centres are
found by k-means on 3-D unit vectors instead of degrees, which avoids a seam at the date line and
distortion towards the poles. Means are projected back onto the sphere. Chords approximate arcs, with a
difference of 0.1 % at 1,000 km.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.experiment import GpsConfig
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.trainer.feed.sampler import Sampler

Floats = NDArray[np.float64]

EARTH_RADIUS_KM = 6371.0088
"""Mean radius R1 of the Earth (IUGG)."""

_BRACKETS_KM = (50.0, 200.0, 500.0)
_MIDDLE_WEIGHT, _FAR_WEIGHT, _FARTHEST_WEIGHT, _NO_GPS_WEIGHT = 2.5, 1.0, 0.3, 1.0
_RAISED_NEAR_WEIGHTS = (7.5, 10.0)
_LEAST_DRAWS = 20_000  # keeps the error of a measured share below 0.4 percentage points


@dataclass(frozen=True)
class SamplingReport:
    """Statistics of the sampler's actual draws, measured before training.

    Shares and distances are over the draws whose photo has coordinates.
    """

    weighted: bool
    """False = uniform: every row once per epoch, no weights."""
    reason: str = ""
    """Why the weights are uniform, or how they were raised; empty = neither."""
    centres: tuple[tuple[float, float], ...] = ()
    """Latitude and longitude of the target's centres, in degrees."""
    near_weight: float = 1.0
    """Weight below 50 km, after raising."""
    draws: int = 0
    """Rows drawn for the measurement."""
    share_50km: float = 0.0
    """Share of draws within 50 km of a centre."""
    share_100km: float = 0.0
    """Share of draws within 100 km of a centre."""
    mean_km: float = 0.0
    """Mean distance of draws to the nearest centre."""
    share_without_gps: float = 0.0
    """Share of all draws whose photo has no coordinates."""

    def lines(self) -> list[str]:
        """The report as lines to print."""
        if not self.weighted:
            return [f"GPS-weighted sampling: off, every photo once an epoch ({self.reason})"]
        places = " · ".join(f"{lat:.2f} {lon:.2f}" for lat, lon in self.centres)
        lines = [
            f"GPS-weighted sampling: {len(self.centres)} target centres (lat lon): {places}",
            f"GPS-weighted sampling: {self.figures()}",
        ]
        return [*lines, f"GPS-weighted sampling: {self.reason}"] if self.reason else lines

    def figures(self) -> str:
        """The measured figures as one text."""
        return (
            f"within 50 km {self.share_50km:.1%}, within 100 km {self.share_100km:.1%}, "
            f"mean distance {self.mean_km:,.0f} km over {self.draws:,} draws with near weight "
            f"{self.near_weight:g} ({self.share_without_gps:.1%} of draws have no GPS and are not counted)"
        )


def gps_weights(
    train: Manifest, target: Manifest | None, config: GpsConfig, *, seed: int
) -> tuple[Tensor, SamplingReport]:
    """Weights of the training rows, and measurements of sampling with them.

    If fewer than ``config.min_share_100km`` of the draws are within 100 km, the weight of the first
    bracket is raised to 7.5, then to 10. The weight of the second, which includes the photos from 50 to
    100 km, is raised in proportion, so the share can only grow.

    Args:
        train: rows to weight.
        target: rows whose coordinates (never labels) are the target; None = uniform.
        config: settings.
        seed: seed of k-means and of the measured draws.

    Returns:
        ``[N]`` float64 weights for :class:`~roadwork_dist.trainer.feed.sampler.Sampler`, and the report.
        Without a basis for weights all are 1 and the report is not ``weighted``.

    Raises:
        DataError: even raised weights miss the share, and ``config.on_shortfall`` is ``stop``.
    """
    reason = _why_uniform(train, target, config)
    if reason or target is None:
        return torch.ones(len(train), dtype=torch.float64), SamplingReport(weighted=False, reason=reason)
    centres = sphere_kmeans(target.coordinates, config.clusters, seed=seed)
    distances = nearest_km(train.coordinates, centres)
    raised = [weight for weight in _RAISED_NEAR_WEIGHTS if weight > config.near_weight]
    for near_weight in (config.near_weight, *raised):
        middle = _middle_weight(near_weight, config)
        weights = bracket_weights(distances, near_weight, middle)
        report = _measure(weights, distances, centres, near_weight, seed)
        if report.share_100km >= config.min_share_100km:
            break
    return torch.from_numpy(weights), _judge(report, config, train.name)


def haversine_km(a: Floats, b: Floats) -> Floats:
    """Great-circle distances ``[N, M]`` in km between degrees ``[N, 2]`` and ``[M, 2]`` (lat, lon).

    Formula: R. W. Sinnott, "Virtues of the Haversine", Sky and Telescope 68 (1984).
    """
    lat_a, lon_a = np.radians(a).T[:, :, None]
    lat_b, lon_b = np.radians(b).T[:, None, :]
    h = np.sin((lat_b - lat_a) / 2) ** 2
    h = h + np.cos(lat_a) * np.cos(lat_b) * np.sin((lon_b - lon_a) / 2) ** 2
    km: Floats = 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(h, 0.0, 1.0)))
    return km


def nearest_km(coordinates: Floats, centres: Floats) -> Floats:
    """Distance ``[N]`` in km of each row to its nearest centre; NaN for rows without GPS."""
    nearest: Floats = haversine_km(coordinates, centres).min(axis=1)
    return nearest


def sphere_kmeans(coordinates: Floats, k: int, *, seed: int) -> Floats:
    """Centres ``[k, 2]`` (lat, lon in degrees) of coordinates ``[N, 2]``; rows with NaN are ignored.

    There are fewer than k centres if there are fewer distinct places.
    """
    from sklearn.cluster import KMeans

    known = coordinates[~np.isnan(coordinates).any(axis=1)]
    lat, lon = np.radians(known).T
    points = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    k = min(k, len(np.unique(points, axis=0)))
    means = KMeans(n_clusters=k, n_init=10, random_state=seed % 2**32).fit(points).cluster_centers_
    x, y, z = (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    centres: Floats = np.degrees(np.stack([np.arcsin(np.clip(z, -1, 1)), np.arctan2(y, x)], axis=1))
    return centres[np.lexsort(centres.T[::-1])]  # k-means orders its clusters at random


def bracket_weights(distances: Floats, near_weight: float, middle_weight: float = _MIDDLE_WEIGHT) -> Floats:
    """Weight ``[N]`` of rows by distance ``[N]`` in km: below 50, 200, 500 km, above; NaN = no GPS."""
    table = np.array([near_weight, middle_weight, _FAR_WEIGHT, _FARTHEST_WEIGHT])
    weights: Floats = table[np.searchsorted(_BRACKETS_KM, distances, side="right").clip(max=3)]
    return np.where(np.isnan(distances), _NO_GPS_WEIGHT, weights)


def _why_uniform(train: Manifest, target: Manifest | None, config: GpsConfig) -> str:
    """Why there is no basis for weights; empty if there is one."""
    if not config.enabled:
        return "gps.enabled is false"
    if target is None:
        return "there is no target set, data.target is null"
    for manifest in (target, train):
        if np.isnan(manifest.coordinates).any(axis=1).all():
            return f"{manifest.name} has no coordinates"
    return ""


def _middle_weight(near_weight: float, config: GpsConfig) -> float:
    """Weight of the second bracket, in the configured ratio to the first."""
    return _MIDDLE_WEIGHT * near_weight / config.near_weight


def _measure(
    weights: Floats, distances: Floats, centres: Floats, near_weight: float, seed: int
) -> SamplingReport:
    """Draw complete epochs from the actual sampler and count."""
    sampler = Sampler(length=len(weights), batch_size=1, seed=seed, weights=weights.tolist())
    epochs = -(-_LEAST_DRAWS // len(weights))
    drawn = distances[np.concatenate([sampler.order(epoch) for epoch in range(epochs)])]
    known = drawn[~np.isnan(drawn)]
    return SamplingReport(
        weighted=True,
        centres=tuple((float(lat), float(lon)) for lat, lon in centres),
        near_weight=near_weight,
        draws=len(drawn),
        share_50km=float((known < 50).mean()) if len(known) else 0.0,
        share_100km=float((known < 100).mean()) if len(known) else 0.0,
        mean_km=float(known.mean()) if len(known) else 0.0,
        share_without_gps=1 - len(known) / len(drawn),
    )


def _judge(report: SamplingReport, config: GpsConfig, name: str) -> SamplingReport:
    """Report raised weights, and raise an error if the share is still missed."""
    wanted = f"{config.min_share_100km:.0%} within 100 km"
    raised = (
        f"weights of the near brackets raised from {config.near_weight:g} and {_MIDDLE_WEIGHT:g} to "
        f"{report.near_weight:g} and {_middle_weight(report.near_weight, config):.3g}"
        if report.near_weight != config.near_weight
        else ""
    )
    if report.share_100km >= config.min_share_100km:
        return replace(report, reason=f"{raised} to reach {wanted}") if raised else report
    if config.on_shortfall == "stop":
        raise DataError(
            f"{name}: too few photos near the target set: {report.figures()}, expected at least {wanted}: "
            "add training photos near the target, set gps.on_shortfall to continue, or gps.enabled to false"
        )
    said = f"{raised}, still below {wanted}" if raised else f"below {wanted}"
    return replace(report, reason=f"{said}; continuing because gps.on_shortfall is continue")
