import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork_dist.detector.pruning import ViewPruning, keep_all


def _mask(counts: list[int], views: int) -> torch.Tensor:
    return torch.arange(views) < torch.tensor(counts).unsqueeze(1)


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    keep=st.sampled_from([0.05, 0.25, 0.5, 0.67, 0.99]),
    seed=st.integers(0, 2**20),
)
def test_against_an_argsort_loop(counts: list[int], keep: float, seed: int) -> None:
    torch.manual_seed(seed)
    views = max(counts)
    pruning = ViewPruning(16, keep).double()
    features, mask = torch.randn(len(counts), views, 16, dtype=torch.float64), _mask(counts, views)
    mask = mask[:, torch.randperm(views)]  # padding may stand anywhere
    out, out_mask, kept = pruning(features, mask)
    assert out.shape[1] == max(1, math.floor(keep * views))
    for row, n in enumerate(mask.sum(dim=1).tolist()):
        scores = pruning.score(torch.nn.functional.gelu(pruning.hidden(features[row]))).squeeze(-1).detach()
        real = [v for v in range(views) if mask[row, v]]
        best = sorted(sorted(real, key=lambda v: -float(scores[v]))[: max(1, math.floor(keep * n))])
        assert kept[row][out_mask[row]].tolist() == best
        assert not kept[row][~out_mask[row]].any()
        expected = features[row, best] * scores[best].sigmoid().unsqueeze(-1)
        torch.testing.assert_close(out[row][out_mask[row]], expected, atol=1e-6, rtol=1e-6)


def test_two_thirds_of_twelve_views_are_eight() -> None:
    pruning = ViewPruning(16, 0.67)
    assert [pruning.count(n) for n in (1, 2, 3, 6, 12)] == [1, 1, 2, 4, 8]
    assert ViewPruning(16, 0.29).count(100) == 29  # 0.29 * 100 is 28.999999999999996


def test_ties_go_to_the_earlier_view() -> None:
    pruning = ViewPruning(16, 0.5)
    _, _, kept = pruning(torch.ones(2, 6, 16), torch.ones(2, 6, dtype=torch.bool))
    assert kept.tolist() == [[0, 1, 2]] * 2


def test_the_scorer_learns_which_view_matters() -> None:
    torch.manual_seed(0)
    pruning = ViewPruning(16, 0.5)
    optimizer = torch.optim.Adam(pruning.parameters(), lr=1e-2)
    features = torch.randn(64, 4, 16)
    features[:, 3, 0] = 5.0  # the useful view, at first as likely to go as any other
    mask = torch.ones(64, 4, dtype=torch.bool)
    useful = torch.zeros(16)
    useful[0] = 1.0
    for _ in range(60):
        optimizer.zero_grad()
        out = pruning(features, mask).features
        (-(out @ useful).sum(dim=1).mean()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pruning.parameters())
        optimizer.step()
    assert (pruning(features, mask).kept == 3).any(dim=1).all()


def test_off_keeps_all() -> None:
    features, mask = torch.randn(2, 3, 4), _mask([3, 2], 3)
    out = keep_all(features, mask)
    assert out.features is features
    assert out.mask is mask
    assert out.kept.tolist() == [[0, 1, 2], [0, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    pruning = ViewPruning(16, 0.5).to(dtype)
    assert pruning(torch.randn(1, 4, 16, dtype=dtype), torch.ones(1, 4, dtype=torch.bool))[0].dtype == dtype
