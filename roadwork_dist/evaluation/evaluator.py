"""Computes metrics, intervals and slices of predictions, as plain data and as lines for a terminal."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from roadwork_dist.common.random import generator_for
from roadwork_dist.evaluation.slices import SMALL, slice_names
from roadwork_dist.metrics.bootstrap import bootstrap_intervals
from roadwork_dist.metrics.classification import (
    best_threshold,
    classification_metrics,
    confusion_matrix,
    matthews,
)

if TYPE_CHECKING:
    import pandas as pd

FIGURES = {
    "mcc": "MCC",
    "accuracy": "Accuracy",
    "f1": "F1",
    "precision": "Precision",
    "recall": "Recall",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "brier": "Brier score",
    "ece": "Calibration error",
}
"""Display name of each metric by its key."""

LOWER_IS_BETTER = ("brier", "ece")

THRESHOLD_RESAMPLES = 400
"""Maximum resamples for a threshold's interval, since each one searches all thresholds."""


def evaluate_predictions(
    frame: "pd.DataFrame", *, threshold: float = 0.5, bootstrap: int = 2000, seed: int = 42
) -> dict[str, Any]:
    """All metrics of a set of predictions.

    Args:
        frame: predictions as from :func:`~roadwork_dist.evaluation.predictions.read_predictions`.
        threshold: photos with a probability above it are called roadwork. Choose it on validation.
        bootstrap: resamples per interval.
        seed: seed of the resampling.

    Returns:
        JSON data: ``photos`` (rows), ``scored`` (rows with a label and a probability), ``unlabelled``,
        ``unscored`` (no finite probability), ``positives``, ``threshold``, ``metrics`` (key →
        ``value``, ``low``, ``high``: 95 % bootstrap interval; None if a metric is undefined),
        ``confusion`` (``tp``, ``fp``, ``fn``, ``tn``) and ``slices`` (a list of ``field``, ``value``, ``n``,
        ``positives``, ``errors``, ``mcc`` (None for one class) and ``accuracy`` with ``…_low``,
        ``…_high``, and ``small``). ``metrics`` is empty if no row is scored.
    """
    used = scored(frame)
    labels, probabilities = labels_and_probabilities(used)
    called = probabilities > threshold
    return {
        "photos": len(frame),
        "scored": len(used),
        "unlabelled": int(frame["label"].isna().sum()),
        "unscored": int((~np.isfinite(frame["probability"].to_numpy(dtype=np.float64))).sum()),
        "positives": int(labels.sum()),
        "threshold": float(threshold),
        "metrics": figures(labels, probabilities, threshold, bootstrap, seed) if len(used) else {},
        "confusion": {
            "tp": int((called & (labels == 1)).sum()),
            "fp": int((called & (labels == 0)).sum()),
            "fn": int((~called & (labels == 1)).sum()),
            "tn": int((~called & (labels == 0)).sum()),
        },
        "slices": slice_rows(used, threshold, bootstrap, seed),
    }


def scored(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The rows that have a label and a finite probability."""
    finite = np.isfinite(frame["probability"].to_numpy(dtype=np.float64))
    rows: pd.DataFrame = frame[frame["label"].notna().to_numpy(dtype=bool) & finite]
    return rows


def labels_and_probabilities(frame: "pd.DataFrame") -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels and probabilities of class 1, both [N], of scored rows."""
    return frame["label"].to_numpy(dtype=np.int64), frame["probability"].to_numpy(dtype=np.float64)


def figures(
    labels: ArrayLike, probabilities: ArrayLike, threshold: float, bootstrap: int, seed: int
) -> dict[str, dict[str, float | None]]:
    """Every metric with its 95 % bootstrap interval; needs at least one row."""
    values = classification_metrics(labels, probabilities, threshold)
    intervals = bootstrap_intervals(labels, probabilities, threshold, bootstrap, seed)
    return {
        key: {"value": value, "low": ends[0] if ends else None, "high": ends[1] if ends else None}
        for key, value in values.items()
        for ends in [intervals[key] if value is not None else None]
    }


def slice_rows(frame: "pd.DataFrame", threshold: float, bootstrap: int, seed: int) -> list[dict[str, Any]]:
    """MCC and accuracy of every slice of scored rows, the largest slice of each property first."""
    labels, probabilities = labels_and_probabilities(frame)
    rows: list[dict[str, Any]] = []
    for field, names in slice_names(frame).items():
        members = np.array(names, dtype=object)
        values, counts = np.unique(members, return_counts=True)
        for value in values[np.argsort(-counts, kind="stable")]:
            inside = members == value
            row = _slice_figures(labels[inside], probabilities[inside], threshold, bootstrap, seed)
            rows.append({"field": field, "value": str(value), **row})
    return rows


def _slice_figures(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64], threshold: float, bootstrap: int, seed: int
) -> dict[str, Any]:
    # not classification_metrics, which warns about a single class; that is normal in a slice
    intervals = bootstrap_intervals(labels, probabilities, threshold, bootstrap, seed)
    called = (probabilities > threshold).astype(np.int64)
    positives, errors = int(labels.sum()), int((called != labels).sum())
    one_class = positives in (0, len(labels))
    mcc = None if one_class else matthews(confusion_matrix(labels, called, classes=2))
    mcc_ends = (None if one_class else intervals["mcc"]) or (None, None)
    accuracy_ends = intervals["accuracy"] or (None, None)
    return {
        "n": len(labels),
        "positives": positives,
        "errors": errors,
        "mcc": mcc,
        "mcc_low": mcc_ends[0],
        "mcc_high": mcc_ends[1],
        "accuracy": 1 - errors / len(labels),
        "accuracy_low": accuracy_ends[0],
        "accuracy_high": accuracy_ends[1],
        "small": len(labels) < SMALL or one_class,
    }


def threshold_interval(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64], bootstrap: int, seed: int
) -> tuple[float, float]:
    """95 % bootstrap interval of :func:`~roadwork_dist.metrics.classification.best_threshold`.

    Args:
        labels: [N], 0 or 1, of the photos that the threshold is chosen on; N >= 1.
        probabilities: [N], of class 1.
        bootstrap: resamples; at most :data:`THRESHOLD_RESAMPLES` are used.
        seed: seed of the resampling.

    Returns:
        Low and high end over the resamples that contain both classes; (0.5, 0.5) if there are none.
    """
    generator = generator_for(seed, "threshold")
    draws = generator.integers(0, len(labels), size=(min(bootstrap, THRESHOLD_RESAMPLES), len(labels)))
    two_classes = [rows for rows in draws if 0 < labels[rows].sum() < len(rows)]
    chosen = [best_threshold(labels[rows], probabilities[rows]) for rows in two_classes]
    low, high = np.quantile(chosen or [0.5], [0.025, 0.975])
    return float(low), float(high)


def error_limit(result: Mapping[str, Any]) -> float | None:
    """Upper 95 % confidence limit of the error rate of a result without errors.

    The bootstrap cannot resample errors that did not occur. 1 - 0.05^(1/n) is the exact binomial limit
    (Clopper & Pearson 1934, doi 10.1093/biomet/26.4.404), about 3/n.

    Returns:
        None if there are errors, or no photos.
    """
    confusion = result["confusion"]
    if not result["scored"] or confusion["fp"] + confusion["fn"]:
        return None
    return float(1 - 0.05 ** (1 / result["scored"]))


def calibration_note(result: Mapping[str, Any]) -> str:
    """Explains a calibration error above its interval; empty if it is not."""
    figure = result["metrics"].get("ece")
    if not figure or figure["high"] is None or figure["value"] <= figure["high"]:
        return ""
    return (
        f"{result['scored']} photos bias the calibration error upwards; its interval, which is corrected for "
        "that, is below it"
    )


def number(value: float | None, digits: int = 3) -> str:
    """Format a metric; an en dash if it has no value."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def summary_lines(result: Mapping[str, Any], name: str = "validation", synthetic: bool = False) -> list[str]:
    """Lines that a run prints at its end: metrics with their intervals.

    Args:
        result: from :func:`evaluate_predictions`.
        name: name of the set of photos.
        synthetic: whether to say that the photos are synthetic.
    """
    kind = "synthetic photos" if synthetic else "photos"
    head = f"{name}: {result['scored']} labelled {kind}, {result['positives']} with roadwork"
    if not result["metrics"]:
        return [f"{head}: no figures without a labelled and scored photo"]
    lines = [f"{head}, threshold {result['threshold']:.3f}", f"  {'':<18} value   95 % interval"]
    for key, label in FIGURES.items():
        figure = result["metrics"][key]
        lines.append(
            f"  {label:<18} {number(figure['value']):>6}   {number(figure['low'])} … {number(figure['high'])}"
        )
    if note := calibration_note(result):
        lines.append(f"  {note}")
    counts = result["confusion"]
    lines.append(
        f"  right {counts['tp'] + counts['tn']}, false alarms {counts['fp']}, missed roadwork {counts['fn']}"
    )
    limit = error_limit(result)
    if limit is not None:
        lines.append(f"  no error in {result['scored']} photos still allows an error rate up to {limit:.1%}")
    if result["unscored"]:
        lines.append(f"  left out: {result['unscored']} photos without a finite probability")
    return lines
