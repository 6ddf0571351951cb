import pytest
import torch
from torch.nn import functional as F

from roadwork_dist.detector.heads import Classifier, MaskHead, view_head, weather_head


def test_classifier_formula() -> None:
    head = Classifier(512, 0.1).eval()
    assert (head.hidden.out_features, head.logits.out_features) == (256, 2)
    x = torch.randn(3, 512)
    torch.testing.assert_close(head(x), head.logits(F.gelu(head.hidden(x))))


def test_shapes() -> None:
    assert view_head(64)(torch.randn(2, 5, 64)).shape == (2, 5, 2)
    assert weather_head(64)(torch.randn(2, 64)).shape == (2, 7)


def test_mask_head_has_about_2_million_parameters() -> None:
    head = MaskHead(512)
    assert sum(p.numel() for p in head.parameters()) == pytest.approx(2e6, rel=0.01)
    assert head(torch.randn(2, 512)).shape == (2, 6, 64, 64)


def test_mask_head_learns_where() -> None:
    torch.manual_seed(0)
    head, x = MaskHead(64), torch.randn(4, 64)
    target = torch.zeros(4, 6, 64, 64)
    for row in range(4):
        target[row, row, 8 * row : 8 * row + 16, 16:40] = 1.0
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(head(x), target).backward()
        optimizer.step()
    assert ((head(x) > 0) == target.bool()).float().mean() > 0.99


@pytest.mark.parametrize(
    "build", [lambda: Classifier(512, 0.0), lambda: view_head(512), lambda: MaskHead(512)]
)
def test_logits_start_near_zero(build: object) -> None:
    torch.manual_seed(0)
    logits = build()(torch.randn(8, 512))
    assert 0 < logits.detach().abs().mean().item() < 0.5
