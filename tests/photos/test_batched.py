"""Augmentation in batches against the path of one view at a time."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor

from roadwork_dist.common.random import generator_for
from roadwork_dist.config.experiment import AugmentConfig
from roadwork_dist.photos.augment import Augmenter
from roadwork_dist.photos.augment.batched import (
    _APPLY,
    augmented_on_device,
    prepared,
    stack_draws,
    to_device,
)
from roadwork_dist.photos.augment.draws import BLUR_KERNELS, DRAWS
from roadwork_dist.photos.augment.operations import OPERATIONS
from roadwork_dist.photos.augment.policy import PROBABILITIES

PHOTO = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)


def views_of(count: int = 6, side: int = 96) -> Tensor:
    return torch.stack([PHOTO[:, 40 * k : 40 * k + side, 60 * k : 60 * k + side] for k in range(count)])


def assert_alike(batched: Tensor, one_by_one: Tensor, share: float = 1e-3, most: int = 1) -> None:
    """Equal but for values that rounding takes the other way."""
    assert batched.dtype == torch.uint8
    assert batched.shape == one_by_one.shape
    difference = (batched.int() - one_by_one.int()).abs()
    assert difference.max() <= most
    assert (difference > 0).float().mean() <= share


@pytest.mark.parametrize("side", [96, 131])
@pytest.mark.parametrize("name", list(DRAWS))
def test_every_operation_gives_what_it_gives_one_by_one(name: str, side: int) -> None:
    views = views_of(side=side)
    before = views.clone()
    one_by_one = torch.stack([OPERATIONS[name](view, generator_for(name, k)) for k, view in enumerate(views)])
    draws = [{name: prepared(name, DRAWS[name](generator_for(name, k), side))} for k in range(len(views))]
    batched = augmented_on_device(views, draws)
    assert_alike(batched, one_by_one)
    assert torch.equal(views, before), "the input is left alone"
    assert not torch.equal(batched, views)


def test_streaks_of_a_large_view_are_wider_and_cross_alike() -> None:
    views = views_of(2, side=384)
    one_by_one = torch.stack([OPERATIONS["rain"](view, generator_for(k)) for k, view in enumerate(views)])
    draws = [{"rain": prepared("rain", DRAWS["rain"](generator_for(k), 384))} for k in range(2)]
    assert_alike(augmented_on_device(views, draws), one_by_one, share=1e-5)


@pytest.mark.parametrize(
    ("policy", "strength"), [("roadwork", 1.0), ("roadwork", 3.0), ("trivial", 1.0), ("trivial", 0.5)]
)
def test_whole_policies_give_what_they_give_one_by_one(policy: str, strength: float) -> None:
    views = views_of()
    augmenter = Augmenter(AugmentConfig(policy=policy, strength=strength), 7)  # type: ignore[arg-type]
    for epoch in (0, 1):
        draws = augmenter.draws("a", epoch, len(views), views.shape[-1])
        # An operation behind another stretches what rounding did there.
        assert_alike(augmented_on_device(views, draws), augmenter(views, "a", epoch), most=3)
    assert draws != augmenter.draws("b", 1, len(views), views.shape[-1])


def test_draws_of_a_view_depend_on_nothing_beside_it() -> None:
    augmenter = Augmenter(AugmentConfig(), 7)
    few, many = (augmenter.draws("a", 5, count, 64) for count in (2, 12))
    np.testing.assert_equal(few, many[:2])
    np.testing.assert_equal(few, Augmenter(AugmentConfig(), 7).draws("a", 5 % 4, 2, 64))


def test_views_of_many_photos_are_augmented_together() -> None:
    augmenter = Augmenter(AugmentConfig(), 3)
    photos = [views_of(4), views_of(2).flip(0)]
    draws = [augmenter.draws(str(k), 0, len(views), 96) for k, views in enumerate(photos)]
    together = augmented_on_device(torch.cat(photos), draws[0] + draws[1])
    for k, part in enumerate(together.split([4, 2])):
        assert_alike(part, augmenter(photos[k], str(k), 0), most=3)


@pytest.mark.parametrize("name", list(DRAWS))
def test_a_view_does_not_depend_on_those_beside_it(name: str) -> None:
    views = views_of()
    draws = [{name: prepared(name, DRAWS[name](generator_for(name, k), 96))} for k in range(len(views))]
    together = augmented_on_device(views, draws)
    for k in (0, 3, 5):
        assert torch.equal(augmented_on_device(views[k : k + 1], draws[k : k + 1])[0], together[k])


def test_a_view_that_drew_nothing_stays_as_it_is() -> None:
    views = views_of(3)
    augmented = augmented_on_device(views, [{}, {"flip": {}}, {}])
    assert torch.equal(augmented[[0, 2]], views[[0, 2]])
    assert torch.equal(augmented[1], views[1].flip(-1))
    assert torch.equal(augmented_on_device(views, [{}, {}, {}]), views)


def test_the_order_of_application_is_the_recipe_s() -> None:
    assert list(DRAWS) == list(PROBABILITIES)
    assert list(_APPLY) == [*list(PROBABILITIES)[:-1], *(f"blur{kernel}" for kernel in BLUR_KERNELS)]


def test_tables_are_small_and_go_to_the_device() -> None:
    draws = [
        {name: prepared(name, draw(generator_for(name, k), 512)) for name, draw in DRAWS.items()}
        for k in range(2)
    ]
    stacked = stack_draws(draws)
    sizes = {name: sum(part.nbytes for part in tables.values()) // 2 for name, tables in stacked.items()}
    assert sizes.pop("noise") == 3 * 512 * 512 + 8, "a byte a value"
    assert sum(sizes.values()) < 10_000
    moved = to_device(stacked, torch.device("meta"))
    assert all(part.device.type == "meta" for tables in moved.values() for part in tables.values())
