"""Report section of one evaluated set of photos: metrics with drawn intervals, charts, map, slices."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roadwork_dist.evaluation.charts import Chart, Line, diagonal, histogram, line_chart, reliability, thin
from roadwork_dist.evaluation.errors_gallery import ErrorCard, ViewsOf, error_cards, worst_errors
from roadwork_dist.evaluation.evaluator import (
    FIGURES,
    LOWER_IS_BETTER,
    calibration_note,
    error_limit,
    evaluate_predictions,
    labels_and_probabilities,
    number,
    scored,
    threshold_interval,
)
from roadwork_dist.evaluation.predictions import OUT_OF_FOLD, as_predictions
from roadwork_dist.evaluation.usmap import ErrorMap, error_map
from roadwork_dist.metrics.calibration import reliability_curve

if TYPE_CHECKING:
    import pandas as pd

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EvaluatedSplit:
    """A set of photos with its predictions.

    Args:
        name: name of the set, for example ``target``.
        frame: its predictions.
        threshold: photos with a probability above it are called roadwork.
        held_out: whether these labels were not used to choose anything (weights, checkpoint, threshold).
        threshold_from: name of the set that the threshold was chosen on; None = it was fixed in advance.
        role: additional sentence on the purpose of the set.
    """

    name: str
    frame: "pd.DataFrame"
    threshold: float
    held_out: bool
    threshold_from: str | None = None
    role: str = ""


@dataclass(frozen=True)
class Bar:
    """A metric with its interval, ready to draw: texts, and positions in per cent of the axis."""

    name: str
    value: str
    ends: str
    dot: float | None
    start: float
    width: float
    lower_is_better: bool = False


@dataclass(frozen=True)
class Section:
    """Data of one set of photos for the template."""

    name: str
    held_out: bool
    caveats: list[str]
    error_limit: float | None
    result: Mapping[str, Any]
    bars: list[Bar]
    axis: list[tuple[float, str]]
    threshold_text: str
    charts: list[Chart]
    map: ErrorMap | None
    slices: list[tuple[str, list[tuple[Mapping[str, Any], Bar]]]]
    errors: int
    cards: list[ErrorCard]


def section_of(
    split: EvaluatedSplit, *, bootstrap: int, seed: int, worst: int, views_of: ViewsOf | None
) -> Section:
    """Evaluate and draw a set of photos.

    Args:
        split: the set.
        bootstrap: resamples per interval.
        seed: seed of the resampling.
        worst: number of worst errors shown; 0 = none.
        views_of: returns the views of a photo.

    Raises:
        DataError: the predictions lack columns.
    """
    frame = as_predictions(split.frame, name=f"predictions of {split.name}")
    result = evaluate_predictions(frame, threshold=split.threshold, bootstrap=bootstrap, seed=seed)
    used = scored(frame)
    labels, probabilities = labels_and_probabilities(used)
    low = axis_start(result)
    confusion = result["confusion"]
    return Section(
        name=split.name,
        held_out=split.held_out,
        caveats=caveats(split, result),
        error_limit=error_limit(result),
        result=result,
        bars=figure_bars(result, low),
        axis=axis_marks(low),
        threshold_text=threshold_text(split, labels, probabilities, bootstrap, seed),
        charts=charts_of(labels, probabilities, split.threshold) if len(used) else [],
        map=map_of(used, split.threshold, split.name),
        slices=slice_bars(result, low),
        errors=confusion["fp"] + confusion["fn"],
        cards=error_cards(worst_errors(used, split.threshold, worst), views_of),
    )


def caveats(split: EvaluatedSplit, result: Mapping[str, Any]) -> list[str]:
    """What a reader must know to interpret the metrics."""
    said = []
    if split.name == OUT_OF_FOLD:
        said.append(
            f"Every photo was predicted by a model that was trained without it ({folds_of(split)} folds): "
            "its label influenced no weight, checkpoint or threshold of that model."
        )
    elif split.held_out:
        said.append("No weight, checkpoint or threshold was chosen with the labels of these photos.")
    elif split.threshold_from == split.name:
        said.append(
            "The threshold was chosen on these same photos, so the figures are optimistic: "
            "expect lower ones on new photos."
        )
    else:
        said.append("These photos were used to choose the model, so the figures are optimistic.")
    if split.role:
        said.append(split.role)
    if result["scored"] and result["positives"] in (0, result["scored"]):
        said.append("All labels are of one class: MCC is 0 by definition, and ranking figures are undefined.")
    limit = error_limit(result)
    if limit is not None:
        said.append(
            f"There is no error among {result['scored']} photos, so the intervals have no width. Up to "
            f"{limit:.1%} of new photos may still be predicted wrongly (95 % limit)."
        )
    mcc = result["metrics"].get("mcc")
    if mcc and mcc["low"] is not None and mcc["high"] - mcc["low"] > 0.1:
        width = mcc["high"] - mcc["low"]
        said.append(f"With {result['scored']} photos, the interval of MCC is {width:.2f} wide.")
    if note := calibration_note(result):
        said.append(f"{note}.")
    for key, what in (("unlabelled", "have no label"), ("unscored", "have no finite probability")):
        if result[key]:
            said.append(f"{result[key]} of {result['photos']} photos {what} and are left out.")
    return said


def folds_of(split: EvaluatedSplit) -> int:
    """Number of folds that predicted."""
    return int(as_predictions(split.frame)["fold"].nunique())


def threshold_text(
    split: EvaluatedSplit, labels: Labels, probabilities: Probabilities, bootstrap: int, seed: int
) -> str:
    """The threshold, its origin, and its interval if it was chosen on this set."""
    if split.threshold_from is None:
        return f"Threshold {split.threshold:.3f}, fixed in advance."
    if split.threshold_from != split.name or len(labels) == 0:
        return f"Threshold {split.threshold:.3f}, chosen on “{split.threshold_from}” for the best MCC."
    low, high = threshold_interval(labels, probabilities, bootstrap, seed)
    return (
        f"Threshold {split.threshold:.3f}, chosen on these photos for the best MCC "
        f"(95 % interval of that choice: {low:.3f} to {high:.3f})."
    )


def axis_start(result: Mapping[str, Any]) -> float:
    """Start of the axis of the drawn intervals: 0, or lower for a negative MCC."""
    lows = [row["mcc_low"] for row in result["slices"] if not row["small"]]
    lows += [figure[key] for figure in result["metrics"].values() for key in ("low", "value")]
    lowest = min((low for low in lows if low is not None), default=0.0)
    return 0.0 if lowest >= 0 else max(math.floor(lowest * 4) / 4, -1.0)


def axis_marks(low: float) -> list[tuple[float, str]]:
    """(position in per cent, text) of the axis marks, from ``low`` to 1."""
    count = round((1 - low) / 0.25)
    step = 0.25 if count <= 5 else 0.5
    values = [v for v in (-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0) if v >= low and v % step == 0]
    return [(percent(v, low), f"{v:g}".replace("-", "−")) for v in values]


def percent(value: float, low: float) -> float:
    """Position of a value on an axis from ``low`` to 1, in per cent, clamped to the axis."""
    return round(min(max(100 * (value - low) / (1 - low), 0.0), 100.0), 2)


def bar(
    name: str, figure: tuple[float | None, float | None, float | None], axis: float, key: str = ""
) -> Bar:
    """Lay out a metric (value, low, high) on an axis from ``axis`` to 1."""
    value, low, high = figure
    dot = None if value is None else percent(value, axis)
    start = percent(low, axis) if low is not None else 0.0
    end = percent(high, axis) if high is not None else start
    ends = "–" if low is None or high is None else f"{signed(low)} – {signed(high)}"
    return Bar(name, signed(value), ends, dot, start, round(end - start, 2), key in LOWER_IS_BETTER)


def signed(value: float | None) -> str:
    """Format a metric with a typographic minus sign."""
    return number(value).replace("-", "−")


def figure_bars(result: Mapping[str, Any], axis: float) -> list[Bar]:
    """All metrics of a result, laid out."""
    return [
        bar(FIGURES[key], (figure["value"], figure["low"], figure["high"]), axis, key)
        for key, figure in result["metrics"].items()
    ]


def slice_bars(
    result: Mapping[str, Any], axis: float
) -> list[tuple[str, list[tuple[Mapping[str, Any], Bar]]]]:
    """Slices grouped by property, each with its MCC laid out; properties with a single slice are skipped."""
    grouped = [(str(name), list(rows)) for name, rows in groupby(result["slices"], key=lambda r: r["field"])]
    return [
        (name, [(row, bar("MCC", (row["mcc"], row["mcc_low"], row["mcc_high"]), axis)) for row in rows])
        for name, rows in grouped
        if len(rows) > 1
    ]


def charts_of(labels: Labels, probabilities: Probabilities, threshold: float) -> list[Chart]:
    """Probability histogram, reliability plot and, with both classes, ROC and precision-recall curves."""
    bins = np.linspace(0, 1, 21)
    counts = [np.histogram(probabilities[labels == k], bins)[0].tolist() for k in (1, 0)]
    curve = reliability_curve(labels, probabilities, bins=10)
    points = [
        (float(p), float(o), int(n))
        for p, o, n in zip(curve.probability, curve.observed, curve.count, strict=True)
        if n
    ]
    charts = [
        histogram("Predicted probabilities", counts[0], counts[1], threshold),
        reliability("Reliability", points),
    ]
    if 0 < labels.sum() < len(labels):
        charts += ranking_charts(labels, probabilities)
    return charts


def ranking_charts(labels: Labels, probabilities: Probabilities) -> list[Chart]:
    """ROC and precision-recall curves; needs labels of both classes."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    false_rate, true_rate, _ = roc_curve(labels, probabilities)
    precision, recall, _ = precision_recall_curve(labels, probabilities)
    share = float(labels.mean())
    unit = (0.0, 1.0)
    roc = Line("ROC", thin(list(zip(false_rate.tolist(), true_rate.tolist(), strict=True)), 400), "c1")
    ranked = list(zip(recall[::-1].tolist(), precision[::-1].tolist(), strict=True))
    pr = Line("detector", thin(ranked, 400), "c1")
    chance = Line(f"always yes ({share:.2f})", [(0.0, share), (1.0, share)], "c6", dashed=True)
    return [
        line_chart(
            "ROC curve",
            [roc],
            x_label="false alarms among photos without roadwork",
            y_label="roadwork found",
            under=diagonal(),
            x_range=unit,
            y_range=unit,
        ),
        line_chart(
            "Precision and recall",
            [pr, chance],
            x_label="recall",
            y_label="precision",
            x_range=unit,
            y_range=unit,
        ),
    ]


def map_of(frame: "pd.DataFrame", threshold: float, name: str) -> ErrorMap | None:
    """Map of right and wrong predictions; None if no photo has coordinates."""
    labels, probabilities = labels_and_probabilities(frame)
    places = list(zip(frame["latitude"].tolist(), frame["longitude"].tolist(), strict=True))
    if not any(math.isfinite(a) and math.isfinite(b) for a, b in places):
        return None
    called = probabilities > threshold
    kinds = np.where(called == (labels == 1), "right", np.where(called, "false-alarm", "missed")).tolist()
    counts = {kind: kinds.count(kind) for kind in ("right", "false-alarm", "missed")}
    title = (
        f"Map of the United States with the photos of {name}: {counts['right']} right, "
        f"{counts['false-alarm']} false alarms, {counts['missed']} missed"
    )
    return error_map([str(i) for i in frame["id"]], places, kinds, title)
