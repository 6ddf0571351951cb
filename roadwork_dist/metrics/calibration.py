"""Calibration: how far predicted probabilities are from observed shares.

N photos · bins of equal width over [0, 1]
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

BINS = 15


@dataclass(frozen=True)
class ReliabilityCurve:
    """Points of a reliability diagram, one entry per bin; NaN where a bin is empty."""

    edges: NDArray[np.float64]  # [bins + 1]
    count: NDArray[np.int64]  # [bins], photos in the bin
    probability: NDArray[np.float64]  # [bins], their mean probability of class 1
    observed: NDArray[np.float64]  # [bins], their share of class 1


def bin_indices(probabilities: NDArray[np.float64], bins: int = BINS) -> NDArray[np.int64]:
    """Bin of each probability; bins include their lower edge, the last one also its upper edge."""
    return np.minimum((probabilities * bins).astype(np.int64), bins - 1)


def reliability_curve(labels: ArrayLike, probabilities: ArrayLike, bins: int = BINS) -> ReliabilityCurve:
    """Mean probability and share of class 1 in bins of equal width.

    Args:
        labels: [N], 0 or 1.
        probabilities: [N] of class 1.
        bins: number of bins.
    """
    truth = np.asarray(labels, dtype=np.float64)
    p = np.asarray(probabilities, dtype=np.float64)
    index = bin_indices(p, bins)
    count = np.bincount(index, minlength=bins)
    filled = np.where(count > 0, count, np.nan)
    return ReliabilityCurve(
        edges=np.linspace(0.0, 1.0, bins + 1),
        count=count.astype(np.int64),
        probability=np.bincount(index, weights=p, minlength=bins) / filled,
        observed=np.bincount(index, weights=truth, minlength=bins) / filled,
    )


def expected_calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = BINS) -> float:
    """Mean distance between probability and observed share of class 1, weighted by photos per bin.

    Σ_b (n_b / N) · |share_b − probability_b| over bins of equal width (Naeini et al. 2015; equation
    3 of arXiv 1706.04599, here with the probability of class 1 instead of that of the predicted
    class; it is then the area between the reliability plot and its diagonal).
    """
    curve = reliability_curve(labels, probabilities, bins)
    gap = np.abs(curve.observed - curve.probability)
    return float(np.nansum(gap * curve.count) / curve.count.sum())
