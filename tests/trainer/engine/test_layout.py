"""Weights as sharded engines take them."""

import torch
from torch import nn

from roadwork_dist.trainer.engine.base import lay_out_contiguously


def test_every_weight_gets_rows_in_order_and_keeps_its_values() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 3, groups=4))
    model.to(memory_format=torch.channels_last)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = dict(model.named_parameters())
    assert model[1].weight.stride()[-1] != 1  # a 1x1 convolution, contiguous by torch's own reckoning
    assert model[1].weight.is_contiguous()
    lay_out_contiguously(model)
    for name, p in model.named_parameters():
        assert p is kept[name]  # an optimizer that was built before holds it
        assert p.stride() == torch.empty(p.shape).stride(), name
        assert torch.equal(p, before[name]), name
