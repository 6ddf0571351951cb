import math

import pytest
import torch

from roadwork_dist.config.batch import MASK_CLASSES, WEATHER
from roadwork_dist.detector.losses.dice import dice_loss_sum
from roadwork_dist.detector.losses.weather import weather_loss_sum

NULL = len(WEATHER)


def test_weather_equals_the_naive_loop():
    logits, weather = torch.randn(6, NULL), torch.tensor([0, NULL, 3, 6, NULL, 2])
    total = 0.0
    for row, word in zip(logits.double(), weather.tolist(), strict=True):
        if word != NULL:
            total += -math.log(torch.softmax(row, 0)[word])
    assert weather_loss_sum(logits, weather).item() == pytest.approx(total, rel=1e-5)


def test_dice_equals_the_naive_loop():
    logits = torch.randn(4, len(MASK_CLASSES), 8, 8)
    masks = (torch.rand(4, len(MASK_CLASSES), 8, 8) < 0.2).float()
    masks[:, 4] = 0  # a class that is in no photo
    known = torch.tensor([True, False, True, True])
    total = 0.0
    for row, mask, has_mask in zip(logits.double(), masks.double(), known, strict=True):
        if not has_mask:
            continue
        for channel, truth in zip(row, mask, strict=True):
            p = torch.sigmoid(channel)
            overlap, area = (p * truth).sum(), p.sum() + truth.sum()
            total += float(1 - (2 * overlap + 1) / (area + 1)) / len(mask)
    assert dice_loss_sum(logits, masks, known).item() == pytest.approx(total, rel=1e-5)


def test_perfect_masks_cost_nothing_and_absent_classes_neither():
    masks = torch.zeros(1, 2, 4, 4)
    masks[:, 0, :2] = 1
    logits = torch.where(masks > 0, 50.0, -50.0)
    assert dice_loss_sum(logits, masks, torch.tensor([True])).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_target_gives_exactly_zero_with_a_gradient(rows):
    weather_logits = torch.randn(rows, NULL, requires_grad=True)
    mask_logits = torch.randn(rows, 6, 4, 4, requires_grad=True)
    weather = weather_loss_sum(weather_logits, torch.full((rows,), NULL))
    dice = dice_loss_sum(mask_logits, torch.zeros(rows, 6, 4, 4), torch.zeros(rows, dtype=torch.bool))
    (weather + dice).backward()
    assert weather.item() == dice.item() == 0.0
    assert weather_logits.grad.abs().sum() == mask_logits.grad.abs().sum() == 0
