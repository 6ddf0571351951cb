import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork_dist.detector.losses.consistency import consistency_loss_sum, rows_with_agreement


def naive(view_logits, view_mask):
    total = 0.0
    for row, mask in zip(view_logits.double(), view_mask, strict=True):
        views = [torch.softmax(view, 0) for view, real in zip(row, mask, strict=True) if real]
        if len(views) < 2:
            continue
        mean = sum(views) / len(views)
        total += sum(float((p * torch.log(p / mean)).sum()) for p in views) / len(views)
    return total


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 5), views=st.integers(1, 8), seed=st.integers(0, 99))
def test_equals_the_naive_loop(rows, views, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, views, 2, generator=generator) * 2
    mask = torch.rand(rows, views, generator=generator) < 0.6
    assert consistency_loss_sum(logits, mask).item() == pytest.approx(naive(logits, mask), rel=1e-4, abs=1e-6)


def test_padding_reaches_neither_value_nor_gradient():
    logits = torch.randn(2, 4, 2)
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    poisoned = logits.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    loss = consistency_loss_sum(poisoned, mask)
    loss.backward()
    torch.testing.assert_close(loss, consistency_loss_sum(logits, mask))
    assert torch.isfinite(poisoned.grad).all()


def test_views_that_agree_cost_nothing():
    logits = torch.tensor([0.3, -1.0]).expand(2, 5, 2)
    assert consistency_loss_sum(logits, torch.ones(2, 5, dtype=torch.bool)).item() == pytest.approx(
        0, abs=1e-6
    )


def test_certain_views_that_disagree_stay_finite():
    logits = torch.tensor([[[500.0, -500.0], [-500.0, 500.0]]], requires_grad=True)
    loss = consistency_loss_sum(logits, torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == pytest.approx(0.693147, rel=1e-5)  # log 2, the largest of two views
    assert torch.isfinite(logits.grad).all()


def test_one_view_or_none_gives_exactly_zero_with_a_gradient():
    mask = torch.tensor([[True, False], [False, False]])
    logits = torch.randn(2, 2, 2, requires_grad=True)
    loss = consistency_loss_sum(logits, mask)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().sum() == 0
    assert rows_with_agreement(mask) == 0
