import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from roadwork_dist.detector.layers import (
    MixtureOfExperts,
    SwiGLU,
    hidden_width,
    init_linear,
    load_balance,
    promote,
    residual_scale,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_hidden_width_is_rounded_up_to_64() -> None:
    assert hidden_width(512, 8 / 3) == 1408
    assert hidden_width(768, 8 / 3) == 2048
    assert hidden_width(64, 1.0) == 64
    assert hidden_width(64, 1.01) == 128


def test_init_linear_spread_and_cut() -> None:
    linear = nn.Linear(400, 300)
    init_linear(linear)
    assert float(linear.weight.detach().std()) == pytest.approx(
        0.05 * 0.88, rel=0.03
    )  # 0.88: cut at two deviations
    assert float(linear.weight.detach().abs().max()) <= 0.1
    assert not linear.bias.any()
    init_linear(linear, std=0.02, scale=residual_scale(8))
    assert float(linear.weight.detach().std()) == pytest.approx(0.02 * 0.25 * 0.88, rel=0.03)


def test_promote_only_under_autocast() -> None:
    x = torch.ones(2, dtype=torch.bfloat16)
    assert promote(x).dtype == torch.bfloat16
    assert promote(x.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert promote(x).dtype == torch.float32


def test_swiglu_formula() -> None:
    ffn = SwiGLU(16, 64).double()
    x = torch.randn(3, 16, dtype=torch.float64)
    w1, w2 = ffn.in_proj.weight[:64], ffn.in_proj.weight[64:]
    expected = (F.silu(x @ w1.T) * (x @ w2.T)) @ ffn.down_proj.weight.T
    torch.testing.assert_close(ffn(x), expected)


def _naive_mixture(moe: MixtureOfExperts, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    out, balance = torch.zeros_like(x), []
    for row in range(x.shape[0]):
        use, mean, tokens = [0.0] * len(moe.experts), [0.0] * len(moe.experts), int(mask[row].sum())
        for view in range(x.shape[1]):
            p = moe.router(x[row, view]).softmax(-1).detach().tolist()
            first, second = sorted(range(len(p)), key=lambda e: -p[e])[:2]
            for e in (first, second):
                out[row, view] += p[e] / (p[first] + p[second]) * moe.experts[e](x[row, view])
                use[e] += float(mask[row, view])
            mean = [m + q * float(mask[row, view]) for m, q in zip(mean, p, strict=True)]
        balance.append(
            sum(len(p) / (2 * tokens) * u * m / tokens for u, m in zip(use, mean, strict=True)),
        )
    return out, torch.tensor(balance)


def test_mixture_against_a_naive_loop() -> None:
    moe = MixtureOfExperts(16, 64, 4).double()
    nn.init.normal_(moe.router.weight)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False], [True, False, False, False, False]])
    out, balance = moe(x, mask)
    naive_out, naive_balance = _naive_mixture(moe, x, mask)
    torch.testing.assert_close(out, naive_out)
    torch.testing.assert_close(balance.float(), naive_balance)


def test_experts_with_the_same_weights_are_one() -> None:
    moe = MixtureOfExperts(16, 64, 4)
    for expert in moe.experts:
        expert.load_state_dict(moe.experts[0].state_dict())
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(moe(x, torch.ones(2, 3, dtype=torch.bool))[0], moe.experts[0](x))


def test_balance_is_1_when_even_and_e_over_k_when_collapsed() -> None:
    even = torch.full((1, 2, 4), 0.25)
    chosen = torch.tensor([[[0, 1], [2, 3]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert float(load_balance(even, chosen, mask)) == pytest.approx(1.0)
    collapsed = torch.tensor([[[0.5, 0.5, 0.0, 0.0]] * 2])
    assert float(load_balance(collapsed, torch.tensor([[[0, 1], [0, 1]]]), mask)) == pytest.approx(2.0)


def test_balance_teaches_the_router_to_spread() -> None:
    moe = MixtureOfExperts(8, 64, 4)
    with torch.no_grad():
        moe.router.weight[0] += 0.3  # expert 0 gets almost every token
    x = torch.randn(8, 12, 8) + 1.0
    mask = torch.ones(8, 12, dtype=torch.bool)
    optimizer = torch.optim.SGD([moe.router.weight], lr=0.5)
    before = moe(x, mask)[1].mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        moe(x, mask)[1].mean().backward()
        optimizer.step()
    after = moe(x, mask)[1].mean().item()
    assert after < 1.2 < before
    assert math.isfinite(after)


def test_unused_experts_still_get_a_gradient() -> None:
    moe = MixtureOfExperts(8, 64, 4)
    x = torch.randn(1, 1, 8)  # one token: two experts idle
    out, balance = moe(x, torch.ones(1, 1, dtype=torch.bool))
    (out.sum() + balance.sum()).backward()
    assert all(p.grad is not None for p in moe.parameters())
