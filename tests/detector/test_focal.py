import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork_dist.config.batch import UNLABELLED
from roadwork_dist.detector.losses.focal import focal_loss_sum


def naive(logits, labels, gamma, alpha, smoothing, soft_labels=None):
    total = 0.0
    soft_labels = labels if soft_labels is None else soft_labels
    for row, label, soft in zip(logits.double(), labels.tolist(), soft_labels.tolist(), strict=True):
        if label == UNLABELLED:
            continue
        for k, p in enumerate(torch.softmax(row, 0).tolist()):
            q = (1 - smoothing) * (soft if k == 1 else 1 - soft) + smoothing / 2
            total += -q * (alpha if k == 1 else 1 - alpha) * (1 - p) ** gamma * math.log(p)
    return total


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.sampled_from([0, 1, UNLABELLED]), min_size=0, max_size=9),
    gamma=st.sampled_from([0.0, 0.5, 2.0]),
    alpha=st.sampled_from([0.25, 0.7]),
    smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_equals_the_naive_loop(labels, gamma, alpha, smoothing, seed):
    logits = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(seed)) * 3
    labels = torch.tensor(labels, dtype=torch.int64)
    fast = focal_loss_sum(logits, labels, gamma=gamma, alpha=alpha, label_smoothing=smoothing)
    assert fast.item() == pytest.approx(naive(logits, labels, gamma, alpha, smoothing), rel=1e-5, abs=1e-6)
    soft = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    fast = focal_loss_sum(logits, labels, soft, gamma=gamma, alpha=alpha, label_smoothing=smoothing)
    expected = naive(logits, labels, gamma, alpha, smoothing, soft)
    assert fast.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_soft_label_of_0_or_1_is_the_label_to_the_bit():
    logits, labels = torch.randn(9, 2), torch.tensor([0, 1, UNLABELLED] * 3)
    soft = labels.clamp_min(0).float()
    expected = focal_loss_sum(logits, labels, label_smoothing=0.1)
    assert torch.equal(focal_loss_sum(logits, labels, soft, label_smoothing=0.1), expected)


def test_without_smoothing_it_is_the_sigmoid_focal_loss_of_torchvision():
    from torchvision.ops import sigmoid_focal_loss

    logits, labels = torch.randn(16, 2), torch.arange(16) % 2
    expected = sigmoid_focal_loss(logits[:, 1] - logits[:, 0], labels.float(), 0.25, 2.0, reduction="sum")
    torch.testing.assert_close(focal_loss_sum(logits, labels, gamma=2.0, alpha=0.25), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_value_and_gradient_stay_finite_where_the_model_is_certain(gamma):
    logits = torch.tensor([[90.0, -90.0], [90.0, -90.0]], requires_grad=True)
    loss = focal_loss_sum(logits, torch.tensor([0, 1]), gamma=gamma, label_smoothing=0.1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("rows", [0, 3])
def test_no_label_gives_exactly_zero_with_a_gradient(rows):
    logits = torch.randn(rows, 2, requires_grad=True)
    loss = focal_loss_sum(logits, torch.full((rows,), UNLABELLED))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().sum() == 0
