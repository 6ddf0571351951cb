import pytest
import torch
from torch.nn import functional as F

from roadwork_dist.detector.pyramid import MultiScalePyramid


@pytest.mark.parametrize(("width", "levels"), [(512, [512, 256, 128]), (768, [768, 384, 192])])
def test_levels_scale_with_the_width(width: int, levels: list[int]) -> None:
    pyramid = MultiScalePyramid(width)
    assert [level.out_features for level in pyramid.levels] == levels
    assert pyramid.merge.in_features == sum(levels)
    assert pyramid(torch.randn(2, 3, width)).shape == (2, 3, width)


def test_formula_and_views_do_not_mix() -> None:
    torch.manual_seed(0)
    pyramid = MultiScalePyramid(64).double()
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    out = pyramid(x)
    for row in range(2):
        for view in range(3):
            one = x[row, view]
            levels = [F.gelu(level.weight @ one + level.bias) for level in pyramid.levels]
            merged = one + pyramid.merge.weight @ torch.cat(levels) + pyramid.merge.bias
            expected = merged / (merged.square().mean() + 1e-6).sqrt() * pyramid.norm.weight
            torch.testing.assert_close(out[row, view], expected)
