import numpy as np
import pytest

from roadwork_dist.common.random import generator_for
from roadwork_dist.metrics import bootstrap
from roadwork_dist.metrics.bootstrap import bootstrap_intervals, resampled_figures
from roadwork_dist.metrics.calibration import expected_calibration_error
from roadwork_dist.metrics.classification import classification_metrics


def sample(n, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, n)
    return labels, np.clip(0.5 + (labels - 0.5) * 0.4 + generator.normal(0, 0.25, n), 0, 1).round(2)


def test_every_figure_equals_a_loop_over_resamples():
    labels, p = sample(40)
    order = np.argsort(p, kind="stable")
    figures = resampled_figures(labels, p, 0.45, n=50, seed=7)
    picks = generator_for(7, "bootstrap").integers(0, 40, size=(50, 40))
    for row, pick in enumerate(picks):
        expected = classification_metrics(labels[order][pick], p[order][pick], 0.45)
        assert {name: values[row] for name, values in figures.items()} == pytest.approx(expected)


def test_small_chunks_give_the_same_draws(monkeypatch):
    labels, p = sample(30)
    whole = bootstrap_intervals(labels, p, n=100, seed=3)
    monkeypatch.setattr(bootstrap, "CHUNK_ELEMENTS", 30 * 7)
    assert bootstrap_intervals(labels, p, n=100, seed=3) == whole


def test_same_seed_same_intervals_which_hold_the_figure_and_shrink_with_more_photos():
    widths = {}
    for n in (60, 1000):
        labels, p = sample(n)
        intervals = bootstrap_intervals(labels, p, n=400, seed=1)
        assert intervals == bootstrap_intervals(labels, p, n=400, seed=1)
        assert intervals != bootstrap_intervals(labels, p, n=400, seed=2)
        figures = classification_metrics(labels, p)
        for name, (low, high) in intervals.items():
            # The estimate of ECE is biased upwards, which its interval is corrected for.
            assert low <= figures[name] <= high or (name == "ece" and low < high)
        widths[n] = intervals["mcc"][1] - intervals["mcc"][0]
    assert widths[1000] < widths[60] / 2


def test_wider_level_wider_interval():
    labels, p = sample(80)
    narrow = bootstrap_intervals(labels, p, n=400, level=0.5)["mcc"]
    wide = bootstrap_intervals(labels, p, n=400, level=0.99)["mcc"]
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_interval_covers_the_true_accuracy_about_as_often_as_it_says():
    covered = 0
    for seed in range(150):
        labels = (np.random.default_rng(seed).random(100) < 0.8).astype(int)  # predicted 1: accuracy 0.8
        low, high = bootstrap_intervals(labels, np.full(100, 0.9), n=200, seed=seed)["accuracy"]
        covered += low <= 0.8 <= high
    assert 0.88 <= covered / 150 <= 0.99


def test_labels_of_one_class_have_no_interval_of_ranks():
    intervals = bootstrap_intervals([1, 1, 1], [0.2, 0.7, 0.9], n=100)
    assert intervals["auroc"] is intervals["average_precision"] is None
    assert intervals["mcc"] == (0.0, 0.0)


def test_resamples_of_one_class_are_left_out_of_ranks_only():
    intervals = bootstrap_intervals([0, 1, 1], [0.2, 0.7, 0.9], n=300)
    assert intervals["auroc"] == (1.0, 1.0)
    assert intervals["mcc"] == (0.0, 1.0)


def logistic(slope):
    """400,000 photos whose probabilities are too far out for a slope above 1.5."""
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 400_000)
    scores = 1.5 * labels + generator.normal(size=len(labels))
    return labels, 1 / (1 + np.exp(-slope * (scores - 0.75)))


@pytest.mark.parametrize(("slope", "least"), [(1.5, 0.9), (1.0, 0.78), (4.0, 0.84)])
def test_interval_covers_the_true_calibration_error(slope, least):
    labels, p = logistic(slope)
    true = expected_calibration_error(labels, p)
    covered = 0
    for seed in range(100):
        some = np.random.default_rng(seed).integers(0, len(p), 251)
        low, high = bootstrap_intervals(labels[some], p[some], n=150, seed=seed)["ece"]
        covered += low <= true <= high
    assert covered / 100 >= least  # the interval of percentiles: 0.00, 0.03, 0.62


def test_interval_of_a_calibration_error_that_chance_explains_starts_at_0():
    p = np.linspace(0.05, 0.95, 200)
    from_0 = []
    for seed in range(40):
        labels = (np.random.default_rng(seed).random(200) < p).astype(int)
        from_0.append(bootstrap_intervals(labels, p, n=200, seed=seed)["ece"][0] == 0.0)
    assert np.mean(from_0) >= 0.85  # 0.43 without a look at what chance shows
    low, high = bootstrap_intervals(1 - labels, p, n=200)["ece"]
    assert 0.3 < low < expected_calibration_error(1 - labels, p) < high


def test_interval_of_a_calibration_error_is_defined_for_few_photos():
    assert bootstrap_intervals([1], [0.75], n=100)["ece"] == (0.0, 0.25)  # labels of 0 would show 0.75
    assert bootstrap_intervals([0], [0.75], n=100)["ece"] == (0.0, 0.75)
    assert bootstrap_intervals([0, 0], [1.0, 1.0], n=100)["ece"] == (1.0, 1.0)
    assert bootstrap_intervals([1, 1, 0], [1.0, 1.0, 0.0], n=100)["ece"] == (0.0, 0.0)
    low, high = bootstrap_intervals([1, 1, 1], [0.2, 0.7, 0.9], n=100)["ece"]
    assert 0 <= low <= high <= 1


def test_small_chunks_find_the_same_calibrated_labels(monkeypatch):
    p = np.linspace(0.05, 0.95, 30)
    whole = bootstrap._errors_if_calibrated(p, 100, 3)
    monkeypatch.setattr(bootstrap, "CHUNK_ELEMENTS", 30 * 7)
    assert bootstrap._errors_if_calibrated(p, 100, 3) == pytest.approx(whole)
    labels = np.array([0, 1] * 15)
    assert whole.min() < expected_calibration_error(labels, p)
    assert len(np.unique(whole)) > 90
