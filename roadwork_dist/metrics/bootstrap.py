"""Bootstrap confidence intervals of the metrics, resampling photos.

R resamples · N photos · G distinct probabilities, ascending

A resample is represented by how often it holds each photo, so every metric of all resamples is a
product or a cumulative sum of one [R, N] matrix of counts.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from roadwork_dist.common.random import generator_for
from roadwork_dist.metrics.calibration import BINS, bin_indices
from roadwork_dist.metrics.classification import FloatArray, IntArray, checked, mcc_from_counts

Interval = tuple[float, float]

CHUNK_ELEMENTS = 2_000_000
"""Counts in memory at once; bounds the memory for large sets."""


def bootstrap_intervals(
    labels: ArrayLike,
    probabilities: ArrayLike,
    threshold: float = 0.5,
    n: int = 2000,
    seed: int = 42,
    level: float = 0.95,
) -> dict[str, Interval | None]:
    """Bootstrap interval of every metric of ``classification_metrics``.

    Photos are drawn with replacement regardless of class (Efron & Tibshirani 1993, chapter 13): the
    share of roadwork in a small set is itself uncertain, and drawing by class would hide that. A
    resample of one class counts with MCC 0 and is left out of AUROC and average precision. The
    threshold is fixed. All intervals are percentile intervals except that of the calibration error, see
    :func:`calibration_interval`.

    Args:
        labels: [N], 0 or 1.
        probabilities: [N] of class 1.
        threshold: class 1 is predicted where the probability is above it.
        n: number of resamples.
        seed: seed of the draws; the same seed gives the same intervals.
        level: share of resamples inside the interval.

    Returns:
        Low and high end by metric; None where it is undefined in every resample.

    Raises:
        DataError: no rows, labels other than 0 and 1, or probabilities outside [0, 1].
    """
    truth, p = checked(labels, probabilities)
    tail = (1 - level) / 2
    intervals: dict[str, Interval | None] = {}
    for name, values in resampled_figures(truth, p, threshold, n, seed).items():
        defined = values[~np.isnan(values)]
        ends = np.quantile(defined, [tail, 1 - tail]) if len(defined) else None
        intervals[name] = None if ends is None else (float(ends[0]), float(ends[1]))
    if (percentiles := intervals["ece"]) is not None:
        intervals["ece"] = calibration_interval(truth, p, percentiles, n, seed, level)
    return intervals


def calibration_interval(
    labels: IntArray, probabilities: FloatArray, percentiles: Interval, n: int, seed: int, level: float
) -> Interval:
    """Basic bootstrap interval of the calibration error, down to 0 where the data fit perfect calibration.

    The estimate v is a mean of absolute values and hence biased upwards; a resample adds the same bias
    again, so percentiles [a, b] of resamples are above the true error. The basic interval [2v - b, 2v - a]
    (Davison & Hinkley 1997, section 5.2) removes the bias. Its ends are kept >= 0, and v may be above it.
    Near 0, where the bootstrap is not valid, v is compared with the errors of labels drawn from the
    probabilities (consistency resampling: Bröcker & Smith 2007, doi 10.1175/WAF993.1): the low end is 0
    unless v exceeds their ``level`` quantile.

    Args:
        labels: [N], 0 or 1.
        probabilities: [N] of class 1.
        percentiles: a and b.
        n: number of times that labels are drawn.
        seed: seed of the draws.
        level: confidence level of the interval.
    """
    value = float(_calibration_error(np.ones((1, len(labels))), labels, probabilities)[0])
    low, high = (max(0.0, 2 * value - end) for end in reversed(percentiles))
    if low > 0:
        calibrated = _errors_if_calibrated(probabilities, n, seed)
        # equal errors differ by rounding, since products of other shapes are summed in another order
        if value <= np.quantile(calibrated, level) + 1e-12:
            low = 0.0
    return low, high


def _errors_if_calibrated(probabilities: FloatArray, n: int, seed: int) -> FloatArray:
    """[n] calibration errors of labels drawn from the probabilities, hence perfectly calibrated."""
    generator = generator_for(seed, "calibrated labels")
    chunk = max(1, CHUNK_ELEMENTS // len(probabilities))
    errors = []
    for start in range(0, n, chunk):
        draws = generator.random((min(chunk, n - start), len(probabilities)))
        gaps = (draws < probabilities) - probabilities  # [R', N]
        errors.append(_mean_gap(gaps, probabilities))
    return np.concatenate(errors)


def resampled_figures(
    labels: IntArray, probabilities: FloatArray, threshold: float, n: int, seed: int
) -> dict[str, FloatArray]:
    """[R] values of every metric, NaN where it is undefined in a resample."""
    order = np.argsort(probabilities, kind="stable")
    truth, p = labels[order], probabilities[order]
    parts = [_figures(counts, truth, p, threshold) for counts in _draws(len(p), n, seed)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _draws(rows: int, n: int, seed: int) -> Iterator[FloatArray]:
    """[R', N] counts of resamples, in chunks of ``n`` resamples in total."""
    generator = generator_for(seed, "bootstrap")
    chunk = max(1, CHUNK_ELEMENTS // rows)
    for start in range(0, n, chunk):
        size = min(chunk, n - start)
        picks = generator.integers(0, rows, size=(size, rows))
        flat = (picks + np.arange(size)[:, None] * rows).ravel()
        yield np.bincount(flat, minlength=size * rows).reshape(size, rows).astype(np.float64)


def _figures(counts: FloatArray, truth: IntArray, p: FloatArray, threshold: float) -> dict[str, FloatArray]:
    """Metrics of [R, N] counts; photos are sorted by probability."""
    positive = truth == 1
    predicted = p > threshold
    tp, fp = counts @ (positive & predicted), counts @ (~positive & predicted)
    fn, tn = counts @ (positive & ~predicted), counts @ (~positive & ~predicted)
    auroc, average_precision = _ranking(counts, positive, p)
    return {
        "mcc": mcc_from_counts(tp, fp, tn, fn),
        "accuracy": (tp + tn) / len(p),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "auroc": auroc,
        "average_precision": average_precision,
        "brier": counts @ ((p - truth) ** 2) / len(p),
        "ece": _calibration_error(counts, truth, p),
    }


def _ranking(counts: FloatArray, positive: NDArray[np.bool_], p: FloatArray) -> tuple[FloatArray, FloatArray]:
    """AUROC (Mann-Whitney, ties count half) and average precision (Σ ΔR·P over distinct values)."""
    starts = np.flatnonzero(
        np.concatenate([[True], p[1:] > p[:-1]])
    )  # photos with equal probabilities are one step
    positives = np.add.reduceat(counts * positive, starts, axis=1)  # [R, G]
    negatives = np.add.reduceat(counts * ~positive, starts, axis=1)
    all_positives, all_negatives = positives.sum(axis=1), negatives.sum(axis=1)
    negatives_below = np.cumsum(negatives, axis=1) - negatives
    wins = (positives * (negatives_below + negatives / 2)).sum(axis=1)
    true_positives = np.cumsum(positives[:, ::-1], axis=1)[:, ::-1]  # predicting 1 at this value and above
    predicted = np.cumsum((positives + negatives)[:, ::-1], axis=1)[:, ::-1]
    precision = true_positives / np.maximum(predicted, 1)
    both = (all_positives > 0) & (all_negatives > 0)
    nothing = np.full(len(counts), np.nan)
    auroc = np.divide(wins, all_positives * all_negatives, out=nothing.copy(), where=both)
    average = np.divide((positives * precision).sum(axis=1), all_positives, out=nothing, where=both)
    return auroc, average


def _calibration_error(counts: FloatArray, truth: IntArray, p: FloatArray) -> FloatArray:
    return _mean_gap(counts * (truth - p), p)


def _mean_gap(gaps: FloatArray, p: FloatArray) -> FloatArray:
    """[R] calibration errors of [R, N] differences between label and probability."""
    members = np.eye(BINS)[bin_indices(p)]  # [N, bins]
    # n_b · |share_b − probability_b| = |Σ (label − probability)|
    errors: FloatArray = np.abs(gaps @ members).sum(axis=1) / len(p)
    return errors


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
