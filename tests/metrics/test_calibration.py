import numpy as np
import pytest

from roadwork_dist.metrics.calibration import expected_calibration_error, reliability_curve


def test_curve_worked_out_by_hand():
    curve = reliability_curve([0, 1, 1, 1], [0.1, 0.3, 0.9, 1.0], bins=2)
    assert curve.edges.tolist() == [0.0, 0.5, 1.0]
    assert curve.count.tolist() == [2, 2]
    assert curve.probability.tolist() == pytest.approx([0.2, 0.95])
    assert curve.observed.tolist() == pytest.approx([0.5, 1.0])


def test_empty_bins_are_nan_and_cost_nothing():
    curve = reliability_curve([1], [0.99])
    assert np.isnan(curve.observed[:-1]).all()
    assert expected_calibration_error([1], [0.99]) == pytest.approx(0.01)


def test_error_equals_the_naive_loop():
    generator = np.random.default_rng(0)
    p = generator.random(200)
    labels = (generator.random(200) < p**2).astype(int)
    total = 0.0
    for low in range(15):
        members = [i for i in range(200) if low / 15 <= p[i] < (low + 1) / 15]
        if members:
            total += len(members) / 200 * abs(np.mean(labels[members]) - np.mean(p[members]))
    assert expected_calibration_error(labels, p) == pytest.approx(total)
