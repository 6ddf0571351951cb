import pytest
import torch
from torch.nn import functional as F

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.config.experiment import ModelConfig
from roadwork_dist.config.io import parse_experiment
from roadwork_dist.detector.detector import RoadworkHead
from roadwork_dist.detector.fusions import FUSIONS, FusedViews, ViewFusion, fusion_name
from roadwork_dist.detector.fusions.gated import GatedViewFusion
from roadwork_dist.detector.fusions.mean import MeanFusion
from roadwork_dist.detector.joint_fusion import JointFusion


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


def test_mean_of_views() -> None:
    x = torch.randn(3, 3, 8)
    x[~MASK] = torch.nan
    pooled, gates = MeanFusion(x.shape[-1])(x, MASK)
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


@pytest.mark.parametrize(
    ("word", "value", "name"),
    [
        ("true", True, "gated"),
        ("false", False, "mean"),
        ("mean", "mean", "mean"),
        ("noisy-or", "noisy-or", "noisy-or"),
    ],
)
def test_the_setting_takes_the_words_of_before_and_names(word: str, value: bool | str, name: str) -> None:
    config = parse_experiment([f"--model.view_fusion={word}"]).model
    assert config.view_fusion == value
    assert fusion_name(config) == name


def test_a_fusion_of_a_user_is_one_class_and_one_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FUSIONS, "_items", dict(FUSIONS._items))

    @FUSIONS.register("last")
    class LastView(ViewFusion):
        """The last real view."""

        def reset_parameters(self) -> None:
            """There are none."""

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> FusedViews:
            last = (mask * torch.arange(mask.shape[1])).argmax(dim=1)
            return FusedViews(x[torch.arange(len(x)), last], F.one_hot(last, mask.shape[1]).float())

    config = ModelConfig(width=64, heads=1, layers=0, prune_keep=1.0, metadata=False, view_fusion="last")
    head = RoadworkHead(8, config, mask_head=False).eval()
    output = head(torch.randn(3, 3, 8), MASK, {})
    assert output.view_gates.argmax(1).tolist() == [2, 2, 1]
    with pytest.raises(ConfigError, match="unknown fusion of views 'lost': did you mean 'last'"):
        RoadworkHead(8, ModelConfig(width=64, view_fusion="lost"), mask_head=False)
