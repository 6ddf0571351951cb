import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from roadwork_dist.common.errors import DataError
from roadwork_dist.metrics import classification
from roadwork_dist.metrics.classification import (
    best_threshold,
    classification_metrics,
    confusion_matrix,
    matthews,
    mcc_accuracy,
)


def sample(n=80, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, n)
    return labels, np.clip(0.5 + (labels - 0.5) * 0.4 + generator.normal(0, 0.25, n), 0, 1).round(2)


@pytest.fixture
def fresh_warning():
    classification._warn_once.cache_clear()


def test_a_case_worked_out_by_hand():
    # Above 0.5: the photos of 0.9 and 0.6. Hence tp 1, fp 1, fn 1, tn 1.
    figures = classification_metrics([1, 0, 1, 0], [0.9, 0.6, 0.4, 0.1])
    assert figures["mcc"] == 0.0
    assert figures["accuracy"] == figures["precision"] == figures["recall"] == figures["f1"] == 0.5
    assert figures["auroc"] == pytest.approx(3 / 4)
    assert figures["average_precision"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert figures["brier"] == pytest.approx((0.01 + 0.36 + 0.36 + 0.01) / 4)
    assert figures["ece"] == pytest.approx((0.1 + 0.6 + 0.6 + 0.1) / 4)  # every photo in its own bin


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scikit_learn(seed):
    labels, p = sample(seed=seed)
    figures = classification_metrics(labels, p, threshold=0.4)
    assert figures["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, p > 0.4))
    assert figures["f1"] == pytest.approx(sk.f1_score(labels, p > 0.4))
    assert figures["brier"] == pytest.approx(sk.brier_score_loss(labels, p))


def test_a_tie_with_the_threshold_is_no_roadwork():
    assert classification_metrics([0, 1], [0.5, 0.6])["accuracy"] == 1.0


@pytest.mark.usefixtures("fresh_warning")
def test_labels_of_one_class_give_mcc_0_and_one_warning(caplog):
    with caplog.at_level(logging.WARNING):
        figures = [classification_metrics([1, 1], [0.2, 0.8]) for _ in range(3)]
        assert mcc_accuracy([1, 1], [[0, 1], [0, 2]]) == {"mcc": 0.0, "accuracy": 1.0}
    assert figures[0]["mcc"] == 0.0
    assert figures[0]["auroc"] is figures[0]["average_precision"] is None
    assert len(caplog.records) == 1
    assert "MCC is defined as 0" in caplog.text


def test_predictions_of_one_class_give_mcc_0():
    figures = classification_metrics([0, 1], [0.1, 0.2])
    assert figures["mcc"] == figures["precision"] == figures["recall"] == figures["f1"] == 0.0


@pytest.mark.parametrize("classes", [2, 4])
def test_mcc_accuracy_agrees_with_scikit_learn(classes):
    generator = np.random.default_rng(1)
    labels, logits = generator.integers(0, classes, 60), generator.normal(size=(60, classes))
    figures = mcc_accuracy(labels, logits)
    assert figures["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, logits.argmax(1)))
    assert figures["accuracy"] == pytest.approx(sk.accuracy_score(labels, logits.argmax(1)))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.1 + 2**-56, 0.4, 0.5, 0.7, 1.0])),
        min_size=2,
        max_size=12,
    ).filter(lambda rows: len({label for label, _ in rows}) == 2)
)
def test_best_threshold_is_the_best_of_all(rows):
    labels, p = (np.array(column) for column in zip(*rows, strict=True))
    threshold = best_threshold(labels, p)

    def mcc(t):
        return matthews(confusion_matrix(labels, (p > t).astype(int), classes=2))

    assert mcc(threshold) == pytest.approx(max(mcc(t) for t in [0.5, *p]))


def test_best_threshold_breaks_ties_towards_the_middle():
    assert best_threshold([0, 1], [0.2, 0.8]) == 0.5
    assert best_threshold([0, 1], [0.6, 0.8]) == pytest.approx(0.7)
    # 0.35 and 0.65 are as good and as far from 0.5: the lower one.
    labels, p = [0, 1, 0, 1], [0.3, 0.4, 0.6, 0.7]
    assert best_threshold(labels, p) == pytest.approx(0.35)


@pytest.mark.usefixtures("fresh_warning")
def test_best_threshold_of_one_class_is_one_half(caplog):
    assert best_threshold([0, 0, 0], [0.1, 0.7, 0.2]) == 0.5
    assert "all labels are of class 0" in caplog.text


@pytest.mark.parametrize(
    ("labels", "p", "message"),
    [
        ([], [], "at least one labelled photo"),
        ([0, 1], [0.5], "expected \\[N\\] twice"),
        ([0, -1], [0.5, 0.5], "drop unlabelled"),
        ([0, 1], [0.5, float("nan")], "row 1 is nan"),
        ([0, 1], [1.5, 0.5], "row 0 is 1.5"),
    ],
)
def test_wrong_input_is_named(labels, p, message):
    with pytest.raises(DataError, match=message):
        classification_metrics(labels, p)


@pytest.mark.parametrize(
    ("labels", "logits", "message"), [([], np.zeros((0, 2)), "N >= 1"), ([2], [[0, 1]], "expected 0 to 1")]
)
def test_mcc_accuracy_names_wrong_input(labels, logits, message):
    with pytest.raises(DataError, match=message):
        mcc_accuracy(labels, logits)
