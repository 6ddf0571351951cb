"""Augmentation and JPEG decoding on a GPU against the CPU's."""

import pytest
import torch
from support.devices import GPU, needs_gpu, random_views

from roadwork_dist.common.random import generator_for
from roadwork_dist.config.experiment import AugmentConfig
from roadwork_dist.data.augment import Augmenter
from roadwork_dist.data.augment.batched import augmented_on_device
from roadwork_dist.data.augment.draws import DRAWS
from roadwork_dist.data.augment.operations import OPERATIONS

pytestmark = needs_gpu


def smooth_views(count: int, side: int) -> torch.Tensor:
    """Views with soft edges: the samples of a moved pixel do not hang on a bit of its position."""
    coarse = random_views(count, side // 8).float()
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").byte()


@pytest.mark.parametrize("name", list(DRAWS))
def test_every_operation_gives_what_it_gives_on_the_cpu(name: str) -> None:
    views = smooth_views(6, 128)
    one_by_one = torch.stack([OPERATIONS[name](view, generator_for(name, k)) for k, view in enumerate(views)])
    draws = [{name: DRAWS[name](generator_for(name, k), 128)} for k in range(len(views))]
    on_gpu = augmented_on_device(views.to(GPU), draws)
    assert on_gpu.device.type == "cuda"
    difference = (on_gpu.cpu().int() - one_by_one.int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() <= 0.01


@pytest.mark.parametrize("policy", ["roadwork", "trivial"])
def test_a_whole_policy_gives_what_it_gives_on_the_cpu(policy: str) -> None:
    views = smooth_views(12, 128)
    augmenter = Augmenter(AugmentConfig(policy=policy), 3)  # type: ignore[arg-type]
    for sample in ("a", "b", "c"):
        draws = augmenter.draws(sample, 1, len(views), 128)
        on_gpu = augmented_on_device(views.to(GPU), draws).cpu()
        difference = (on_gpu.int() - augmenter(views, sample, 1).int()).abs()
        assert (difference > 3).float().mean() <= 1e-3
        assert difference.float().mean() <= 0.05
