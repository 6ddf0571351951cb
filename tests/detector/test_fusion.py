import pytest
import torch
from torch.nn import functional as F

from roadwork_dist.detector.fusion import GatedViewFusion, JointFusion, masked_mean


def _fusion() -> GatedViewFusion:
    torch.manual_seed(0)
    fusion = GatedViewFusion(64)
    torch.nn.init.normal_(fusion.gate.weight)
    return fusion.double()


MASK = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])


def test_pooled_against_a_loop() -> None:
    fusion = _fusion()
    x = torch.randn(3, 3, 64, dtype=torch.float64)
    pooled, gates = fusion(x, MASK)
    for row in range(3):
        real = [v for v in range(3) if MASK[row, v]]
        g = {v: fusion.gate(F.gelu(fusion.gate_hidden(x[row, v]))).sigmoid().item() for v in real}
        assert gates[row].detach().tolist() == pytest.approx([g.get(v, 0.0) for v in range(3)], rel=1e-6)
        views = x[row : row + 1, real]
        every = torch.ones(1, len(real), dtype=torch.bool)
        views = views + fusion.cross_attention(views, every, torch.tensor([list(g.values())]))
        views = views + fusion.refine(fusion.refine_norm(views), every)
        expected = sum(g[v] * views[0, i] for i, v in enumerate(real)) / sum(g.values())
        torch.testing.assert_close(pooled[row], expected, rtol=1e-5, atol=1e-6)


def test_it_starts_as_the_mean_of_the_refined_views() -> None:
    fusion = GatedViewFusion(64)
    _, gates = fusion(torch.randn(3, 3, 64), MASK)
    torch.testing.assert_close(gates, 0.5 * MASK)


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_gates_that_are_all_shut_or_open_give_no_nan(bias: float) -> None:
    fusion = _fusion()
    torch.nn.init.constant_(fusion.gate.bias, bias)
    x = torch.randn(3, 3, 64, dtype=torch.float64, requires_grad=True)
    pooled, gates = fusion(x, MASK)
    pooled.sum().backward()
    assert pooled.isfinite().all()
    assert gates.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_masked_mean() -> None:
    x = torch.randn(3, 3, 8)
    x[~MASK] = torch.nan
    pooled, gates = masked_mean(x, MASK)
    for row in range(3):
        torch.testing.assert_close(pooled[row], x[row, MASK[row]].mean(dim=0))
    assert torch.equal(gates, MASK.float())


def test_joint_fusion_formula_and_dropout() -> None:
    joint = JointFusion(8, 4, dropout=0.5)
    vision, metadata = torch.randn(64, 8), torch.randn(64, 4)
    expected = F.gelu(joint.linear(torch.cat([vision, metadata], dim=1)))
    torch.testing.assert_close(joint.eval()(vision, metadata), expected)
    assert (joint.train()(vision, metadata) == 0).float().mean() == pytest.approx(0.5, abs=0.1)


def test_joint_fusion_of_vision_only() -> None:
    assert JointFusion(8, 0, 0.0)(torch.randn(2, 8), None).shape == (2, 8)
