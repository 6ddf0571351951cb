import json
import logging
import math

import numpy as np
import pytest
from support.synthetic_run import synthetic_predictions

from roadwork_dist.evaluation.evaluator import (
    FIGURES,
    error_limit,
    evaluate_predictions,
    labels_and_probabilities,
    scored,
    summary_lines,
    threshold_interval,
)
from roadwork_dist.evaluation.report_section import EvaluatedSplit, caveats
from roadwork_dist.metrics.bootstrap import bootstrap_intervals
from roadwork_dist.metrics.classification import best_threshold, classification_metrics


def test_figures_are_those_of_the_metrics() -> None:
    frame = synthetic_predictions(80)
    result = evaluate_predictions(frame, threshold=0.4, bootstrap=200, seed=7)
    labels, probabilities = labels_and_probabilities(frame)
    values = classification_metrics(labels, probabilities, 0.4)
    intervals = bootstrap_intervals(labels, probabilities, 0.4, 200, 7)
    assert list(result["metrics"]) == list(FIGURES) == list(values)
    for key, figure in result["metrics"].items():
        assert figure["value"] == values[key]
        assert (figure["low"], figure["high"]) == intervals[key]
    called = probabilities > 0.4
    expected = {"tp": called & (labels == 1), "fp": called & (labels == 0)}
    expected |= {"fn": ~called & (labels == 1), "tn": ~called & (labels == 0)}
    assert result["confusion"] == {key: int(rows.sum()) for key, rows in expected.items()}
    json.dumps(result, allow_nan=False)


def test_a_probability_at_the_threshold_is_called_no_roadwork() -> None:
    frame = synthetic_predictions(2)
    frame["label"], frame["probability"] = [1, 0], [0.5, 0.5]
    assert evaluate_predictions(frame, threshold=0.5, bootstrap=100)["confusion"]["fn"] == 1


def test_slices_hold_the_figures_of_their_rows() -> None:
    frame = synthetic_predictions(150)
    result = evaluate_predictions(frame, threshold=0.5, bootstrap=100)
    assert sum(row["n"] for row in result["slices"] if row["field"] == "scene") == 150
    row = next(row for row in result["slices"] if row["field"] == "photo size" and row["value"] == "2–5 Mpx")
    part = frame[frame["width"] == 2016]
    labels, probabilities = labels_and_probabilities(part)
    assert row["n"] == len(part)
    assert row["positives"] == labels.sum()
    values = classification_metrics(labels, probabilities, 0.5)
    assert row["mcc"] == pytest.approx(values["mcc"])
    assert row["accuracy"] == pytest.approx(values["accuracy"])
    assert (row["mcc_low"], row["mcc_high"]) == bootstrap_intervals(labels, probabilities, 0.5, 100, 42)[
        "mcc"
    ]
    assert not row["small"]


def test_a_slice_of_one_class_has_no_mcc_and_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    frame = synthetic_predictions(60)
    frame.loc[frame["label"] == 1, "scene"] = "urban"
    frame.loc[frame["label"] == 0, "scene"] = "rural"
    with caplog.at_level(logging.WARNING):
        rows = evaluate_predictions(frame, threshold=0.5, bootstrap=100)["slices"]
    scenes = [row for row in rows if row["field"] == "scene"]
    assert [row["mcc"] for row in scenes] == [None, None]
    assert all(row["small"] for row in scenes)
    assert not caplog.records


def test_rows_without_label_or_probability_are_counted_and_left_out() -> None:
    frame = synthetic_predictions(40)
    frame.loc[0, "label"] = None
    frame.loc[[1, 2], "probability"] = [math.nan, math.inf]
    result = evaluate_predictions(frame, bootstrap=100)
    assert (result["photos"], result["scored"], result["unlabelled"], result["unscored"]) == (40, 37, 1, 2)
    assert len(scored(frame)) == 37
    assert "left out: 2 photos" in "\n".join(summary_lines(result))


def test_no_scored_row_gives_no_figures() -> None:
    frame = synthetic_predictions(3)
    frame["label"] = None
    result = evaluate_predictions(frame.astype({"label": "Int64"}), bootstrap=100)
    assert result["metrics"] == {}
    assert result["slices"] == []
    assert summary_lines(result) == [
        "validation: 0 labelled photos, 0 with roadwork: no figures without a labelled and scored photo"
    ]


def test_summary_shows_figures_intervals_and_counts() -> None:
    result = evaluate_predictions(synthetic_predictions(80), threshold=0.5, bootstrap=100)
    lines = summary_lines(result, "target", synthetic=True)
    mcc = result["metrics"]["mcc"]
    assert (
        lines[0]
        == f"target: 80 labelled synthetic photos, {result['positives']} with roadwork, threshold 0.500"
    )
    assert lines[2] == f"  {'MCC':<18} {mcc['value']:>6.3f}   {mcc['low']:.3f} … {mcc['high']:.3f}"
    counts = result["confusion"]
    assert lines[-1].endswith(f"false alarms {counts['fp']}, missed roadwork {counts['fn']}")


def test_no_errors_still_allow_some() -> None:
    frame = synthetic_predictions(50)
    frame["probability"] = frame["label"].astype(float)
    result = evaluate_predictions(frame, bootstrap=100)
    limit = error_limit(result)
    assert limit is not None
    assert (1 - limit) ** 50 == pytest.approx(0.05)  # 50 right answers in a row are then just 5 % likely
    assert "up to 5.8%" in summary_lines(result)[-1]
    frame.loc[0, "probability"] = 1 - frame["probability"][0]
    assert error_limit(evaluate_predictions(frame, bootstrap=100)) is None


def test_a_calibration_error_above_its_interval_is_explained() -> None:
    frame = synthetic_predictions(250)
    frame["probability"] = np.linspace(0.02, 0.98, 250)
    frame["label"] = (np.random.default_rng(1).random(250) < frame["probability"]).astype(int)
    result = evaluate_predictions(frame, bootstrap=200)
    figure = result["metrics"]["ece"]
    assert figure["low"] == 0 < figure["high"] < figure["value"]
    assert "250 photos bias the calibration error upwards" in "\n".join(summary_lines(result))
    split = EvaluatedSplit(name="val", frame=frame, threshold=0.5, held_out=False)
    assert any("its interval, which is corrected" in caveat for caveat in caveats(split, result))
    frame["label"] = 1 - frame["label"]
    result = evaluate_predictions(frame, bootstrap=200)
    assert not any("bias" in line for line in [*summary_lines(result), *caveats(split, result)])


def test_interval_of_the_threshold_holds_it_and_needs_two_classes() -> None:
    labels, probabilities = labels_and_probabilities(synthetic_predictions(120))
    low, high = threshold_interval(labels, probabilities, 200, seed=1)
    assert 0 < low <= best_threshold(labels, probabilities) <= high < 1
    assert threshold_interval(np.ones(5, dtype=np.int64), np.full(5, 0.7), 100, seed=1) == (0.5, 0.5)
