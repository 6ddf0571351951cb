"""Metrics of a classifier. Class 1 (roadwork) is predicted where its probability is above the threshold.

N photos · K classes
"""

import logging
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from roadwork_dist.common.errors import DataError
from roadwork_dist.metrics.calibration import expected_calibration_error

logger = logging.getLogger(__name__)

Figures = dict[str, float | None]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def classification_metrics(labels: ArrayLike, probabilities: ArrayLike, threshold: float = 0.5) -> Figures:
    """MCC, accuracy, F1, precision, recall, AUROC, average precision, Brier score and ECE.

    Args:
        labels: [N], 0 or 1.
        probabilities: [N] of class 1.
        threshold: class 1 is predicted where the probability is above it, so a tie is class 0.

    Returns:
        ``mcc, accuracy, f1, precision, recall, auroc, average_precision, brier, ece``. MCC is 0
        where labels or predictions are all of one class; precision, recall and F1 are 0 where they
        divide by 0. ``auroc`` and ``average_precision`` are undefined and therefore None (null in JSON)
        where the labels are all of one class. ``ece`` has 15 bins of equal width, see
        :func:`roadwork_dist.metrics.calibration.expected_calibration_error`.

    Raises:
        DataError: no rows, labels other than 0 and 1, or probabilities outside [0, 1].
    """
    from sklearn import metrics

    truth, p = checked(labels, probabilities)
    predicted = (p > threshold).astype(np.int64)
    ranks = warn_if_single_class(truth)
    return {
        "mcc": matthews(confusion_matrix(truth, predicted, classes=2)),
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        "f1": float(metrics.f1_score(truth, predicted, zero_division=0)),
        "precision": float(metrics.precision_score(truth, predicted, zero_division=0)),
        "recall": float(metrics.recall_score(truth, predicted, zero_division=0)),
        "auroc": float(metrics.roc_auc_score(truth, p)) if ranks else None,
        "average_precision": float(metrics.average_precision_score(truth, p)) if ranks else None,
        "brier": float(np.mean((p - truth) ** 2)),
        "ece": expected_calibration_error(truth, p),
    }


def mcc_accuracy(labels: ArrayLike, logits: ArrayLike) -> dict[str, float]:
    """MCC and accuracy of the most probable class, for any number of classes; cheap to compute.

    Args:
        labels: [N] class indices.
        logits: [N, K].

    Returns:
        ``mcc`` (0, with a warning, where the labels are all of one class) and ``accuracy``.

    Raises:
        DataError: no rows, shapes that do not match, or a label out of range.
    """
    truth, scores = np.asarray(labels, dtype=np.int64), np.asarray(logits)
    if len(truth) == 0 or scores.ndim != 2 or len(scores) != len(truth):
        raise DataError(
            f"got labels {truth.shape} and logits {scores.shape}, expected [N] and [N, K], N >= 1"
        )
    classes = scores.shape[1]
    if truth.min() < 0 or truth.max() >= classes:
        raise DataError(f"labels go from {truth.min()} to {truth.max()}, expected 0 to {classes - 1}")
    warn_if_single_class(truth)
    counts = confusion_matrix(truth, scores.argmax(axis=1), classes=classes)
    return {"mcc": matthews(counts), "accuracy": float(np.trace(counts) / len(truth))}


def confusion_matrix(labels: IntArray, predicted: IntArray, *, classes: int) -> IntArray:
    """[K, K] counts; row = true class, column = predicted class."""
    counts = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)


def matthews(confusion: NDArray[Any]) -> float:
    """Matthews correlation coefficient of a [K, K] confusion matrix; 0 where it is 0/0.

    For two classes as in Matthews 1975 (doi 10.1016/0005-2795(75)90109-9), for more the R_K of
    Gorodkin 2004 (doi 10.1016/j.compbiolchem.2004.09.006).
    """
    counts = confusion.astype(np.float64)
    true, predicted, total = counts.sum(axis=1), counts.sum(axis=0), counts.sum()
    covariance = np.trace(counts) * total - true @ predicted
    variances = (total**2 - true @ true) * (total**2 - predicted @ predicted)
    return float(covariance / np.sqrt(variances)) if variances > 0 else 0.0


def best_threshold(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """The threshold with the highest MCC; choose it on validation photos only.

    Candidates are 0.5, the midpoints between neighbouring probabilities, and the highest probability.
    Ties go to the candidate nearest to 0.5, then to the lower one, so the choice is deterministic.

    Returns:
        A threshold for ``probability > threshold``; 0.5, with a warning, for labels of one class.

    Raises:
        DataError: no rows, labels other than 0 and 1, or probabilities outside [0, 1].
    """
    truth, p = checked(labels, probabilities)
    if not warn_if_single_class(truth):
        return 0.5
    values = np.unique(p)
    middles = (values[:-1] + values[1:]) / 2
    middles = np.where(middles >= values[1:], values[:-1], middles)  # the midpoint rounds up to the neighbour
    candidates = np.concatenate([middles, [0.5, values[-1]]])  # the last one predicts no roadwork at all
    order = np.argsort(p)
    positives_up_to = np.concatenate([[0], np.cumsum(truth[order])])
    below = np.searchsorted(p[order], candidates, side="right")  # photos predicted 0
    positives = int(truth.sum())
    false_negative = positives_up_to[below].astype(np.float64)
    true_negative = below - false_negative
    true_positive = positives - false_negative
    scores = mcc_from_counts(
        true_positive, len(p) - below - true_positive, true_negative, false_negative
    ).round(12)
    best = candidates[scores == scores.max()]
    return float(min(best, key=lambda t: (round(abs(t - 0.5), 12), t)))


def mcc_from_counts(tp: FloatArray, fp: FloatArray, tn: FloatArray, fn: FloatArray) -> FloatArray:
    """MCC of two classes, elementwise; 0 where it is 0/0."""
    denominator = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return np.divide(tp * tn - fp * fn, denominator, out=np.zeros_like(denominator), where=denominator > 0)


def checked(labels: ArrayLike, probabilities: ArrayLike) -> tuple[IntArray, FloatArray]:
    """Labels as int64 and probabilities as float64, both [N].

    Raises:
        DataError: no rows, lengths that differ, labels other than 0 and 1, values outside [0, 1].
    """
    truth, p = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != p.shape or len(truth) == 0:
        raise DataError(
            f"got labels {truth.shape} and probabilities {p.shape}, expected [N] twice, N >= 1: "
            "metrics need at least one labelled photo"
        )
    if not np.isin(truth, (0, 1)).all():
        raise DataError(
            f"labels are {np.unique(truth)[:5].tolist()}, expected 0 and 1: drop unlabelled photos"
        )
    if not ((p >= 0) & (p <= 1)).all():  # False for NaN as well
        row = int(np.flatnonzero(~((p >= 0) & (p <= 1)))[0])
        raise DataError(f"probability of row {row} is {p[row]}, expected a number from 0 to 1")
    return truth.astype(np.int64), p


def warn_if_single_class(labels: IntArray) -> bool:
    """True if there are two or more classes; else warn (once per class) and return False."""
    first = int(labels[0])
    if (labels != first).any():
        return True
    _warn_once(first)
    return False


@cache
def _warn_once(label: int) -> None:
    logger.warning(
        "all labels are of class %d: MCC is defined as 0, AUROC and average precision have no value", label
    )
