import numpy as np
import pytest
import torch

from roadwork_dist.common.random import generator_for
from roadwork_dist.config.experiment import AugmentConfig
from roadwork_dist.photos.augment import Augmenter, augmenter_for, draw_epoch
from roadwork_dist.photos.augment.operations import OPERATIONS
from roadwork_dist.photos.augment.policy import PROBABILITIES, chosen_operations

SIDE = 80


def views_of(count: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth colour gradients with a sharp dark square, so that every operation shows."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(40, 215, SIDE)
    views = np.stack([np.broadcast_to(ramp, (SIDE, SIDE)), np.broadcast_to(ramp[:, None], (SIDE, SIDE))])
    views = np.stack([np.stack([views[0], views[1], np.full((SIDE, SIDE), 90.0)])] * count)
    views[:, :, 5:20, 30:40] = rng.uniform(0, 30, (count, 3, 1, 1))
    return torch.from_numpy(views).round().to(torch.uint8)


@pytest.mark.parametrize("name", list(PROBABILITIES))
def test_every_operation_changes_a_view_and_is_pure(name: str) -> None:
    view = views_of()[0]
    before = view.clone()
    first = OPERATIONS[name](view, generator_for("draw", 1))
    assert torch.equal(view, before), "the input is left alone"
    assert first.dtype == torch.uint8
    assert first.shape == view.shape
    assert not torch.equal(first, view)
    state = torch.get_rng_state()
    assert torch.equal(OPERATIONS[name](view, generator_for("draw", 1)), first)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn from the global generator"
    if name != "flip":
        others = [OPERATIONS[name](view, generator_for("draw", k)) for k in range(2, 8)]
        assert any(not torch.equal(other, first) for other in others)


def test_the_table_is_the_recipe_and_complete() -> None:
    assert set(PROBABILITIES) == set(OPERATIONS)
    assert len(PROBABILITIES) == 15
    assert list(PROBABILITIES.values()) == [
        *(0.5, 0.3, 0.2, 0.3),  # flip, rotate, perspective, zoom
        *(0.4, 0.4, 0.3, 0.2),  # brightness, contrast, saturation, hue
        *(0.25, 0.2, 0.25, 0.15),  # rain, fog, shadow, sun glare
        *(0.15, 0.1, 0.1),  # noise, motion blur, blur
    ]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 1.5, 4.0])
def test_strength_scales_how_often_operations_are_used(strength: float) -> None:
    trials = 3000
    rng = np.random.default_rng(0)
    counts = dict.fromkeys(PROBABILITIES, 0)
    for _ in range(trials):
        for name in chosen_operations(strength, rng):
            counts[name] += 1
    for name, probability in PROBABILITIES.items():
        expected = min(1.0, probability * strength)
        spread = 5 * (expected * (1 - expected) / trials) ** 0.5
        assert counts[name] / trials == pytest.approx(expected, abs=spread + 1e-9)


@pytest.mark.parametrize("policy", ["roadwork", "trivial"])
def test_draws_depend_on_seed_epoch_sample_and_view_only(policy: str) -> None:
    config = AugmentConfig(policy=policy, copies=0)  # type: ignore[arg-type]
    augmenter, views = Augmenter(config, 7), views_of(6)
    ids = ["a", "b", "c"]
    forward = {(i, e): augmenter(views, i, e) for e in (0, 1) for i in ids}
    torch.manual_seed(123)  # another history of the global generators
    state = torch.get_rng_state()
    backward = {(i, e): Augmenter(config, 7)(views, i, e) for e in (1, 0) for i in reversed(ids)}
    assert torch.equal(torch.get_rng_state(), state)
    for key, augmented in forward.items():
        assert torch.equal(augmented, backward[key])
        # a view's draws do not depend on how many views stand beside it
        assert torch.equal(augmented[:2], augmenter(views[:2], *key))
    distinct = [*forward.values(), Augmenter(config, 8)(views, "a", 0)]
    assert len({t.numpy().tobytes() for t in distinct}) == len(distinct)


def test_views_of_one_photo_draw_their_own() -> None:
    same = views_of(1).repeat(8, 1, 1, 1)
    augmented = Augmenter(AugmentConfig(copies=0), 0)(same, "a", 0)
    assert len({view.numpy().tobytes() for view in augmented}) >= 6


def test_strength_zero_changes_nothing() -> None:
    views = views_of()
    for policy in ("roadwork", "trivial"):
        config = AugmentConfig(policy=policy, strength=0.0)  # type: ignore[arg-type]
        assert torch.equal(Augmenter(config, 0)(views, "a", 3), views)


def test_epoch_e_uses_copy_e_mod_copies() -> None:
    assert [draw_epoch(AugmentConfig(copies=3), e) for e in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [draw_epoch(AugmentConfig(copies=0), e) for e in range(4)] == [0, 1, 2, 3]
    augmenter, views = Augmenter(AugmentConfig(copies=2), 0), views_of()
    copies = [augmenter(views, "a", e) for e in range(4)]
    assert torch.equal(copies[0], copies[2])
    assert torch.equal(copies[1], copies[3])
    assert not torch.equal(copies[0], copies[1])
    more = Augmenter(AugmentConfig(copies=4), 0)
    assert torch.equal(more(views, "a", 1), copies[1]), "a copy stays what it is when copies are added"


def test_identity_names_what_decides_the_draws() -> None:
    base = Augmenter(AugmentConfig(), 1).identity()
    assert base == Augmenter(AugmentConfig(copies=9), 1).identity()
    for other in (
        Augmenter(AugmentConfig(), 2),
        Augmenter(AugmentConfig(strength=0.5), 1),
        Augmenter(AugmentConfig(policy="trivial"), 1),
    ):
        assert other.identity() != base


def test_augmentation_can_be_off() -> None:
    assert augmenter_for(AugmentConfig(enabled=False), 0) is None
    assert augmenter_for(AugmentConfig(), 3) == Augmenter(AugmentConfig(), 3)


def test_amounts_stay_within_the_recipe() -> None:
    grey = torch.full((3, SIDE, SIDE), 100, dtype=torch.uint8)
    for k in range(30):
        assert 80 <= OPERATIONS["brightness"](grey, generator_for(k)).float().mean() <= 120
        noisy = OPERATIONS["noise"](grey, generator_for(k)).float()
        assert 4.8 <= noisy.std() <= 10.3
    spike = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    spike[:, 40, 40] = 255
    smeared = OPERATIONS["motion_blur"](spike, generator_for(0))
    assert (smeared[:, 40] > 0).sum() > 3, "smeared along the row"
    assert (smeared.sum(dim=2) > 0).sum() == 3, "and along no other"
