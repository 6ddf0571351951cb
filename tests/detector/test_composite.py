import logging

import pytest
import torch

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.config.batch import MASK_CLASSES, UNLABELLED, WEATHER, Batch, ModelOutput
from roadwork_dist.config.experiment import LossConfig
from roadwork_dist.detector.losses.composite import RoadworkLoss
from roadwork_dist.detector.losses.consistency import consistency_loss_sum
from roadwork_dist.detector.losses.focal import focal_loss_sum
from roadwork_dist.detector.losses.part import PARTS, LossPart

SIDE = 8


def make(rows, seed, dtype=torch.float32):
    """A batch with every target missing here and there, and an output with gradients."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    batch = Batch(
        label=torch.randint(-1, 2, (rows,), generator=g),
        view_mask=torch.rand(rows, 4, generator=g) < 0.7,
        weather=torch.randint(0, len(WEATHER) + 1, (rows,), generator=g),
        mask=(torch.rand(rows, len(MASK_CLASSES), SIDE, SIDE, generator=g) < 0.3).float(),
        mask_known=torch.rand(rows, generator=g) < 0.5,
    )
    output = ModelOutput(
        logits=randn(rows, 2),
        view_logits=randn(rows, 4, 2),
        view_mask=batch["view_mask"],
        weather_logits=randn(rows, len(WEATHER)),
        mask_logits=randn(rows, len(MASK_CLASSES), SIDE, SIDE),
        view_gates=torch.ones(rows, 4),
        kept=torch.arange(4).expand(rows, 4),
        fused=torch.zeros(rows, 8),
        balance=randn(rows),
    )
    return output, batch


def join(parts):
    """Concatenate (output, batch) pairs along B."""
    outputs, batches = zip(*parts, strict=True)
    batch = {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
    output = {key: torch.cat([getattr(o, key) for o in outputs]) for key in ModelOutput._fields}
    return ModelOutput(**output), batch


def total(loss, sums, counts):
    return sum(w * sums[p] / counts[p] for p, w in loss.weights.items() if counts[p])


def test_weights_of_the_recipe():
    assert RoadworkLoss(LossConfig(), with_masks=True).weights == {
        "focal": 0.40,
        "consistency": 0.25,
        "weather": 0.15,
        "dice": 0.20,
    }
    assert RoadworkLoss(LossConfig(), with_masks=False).weights == {
        "focal": 0.50,
        "consistency": 0.30,
        "weather": 0.20,
    }
    with_experts = RoadworkLoss(LossConfig(balance=0.02), with_masks=False, with_experts=True)
    assert with_experts.weights["balance"] == 0.02


def test_explicit_weights_give_parts_that_are_left_out_zero(caplog):
    config = LossConfig(weights={"focal": 1.0, "dice": 0.5})
    assert RoadworkLoss(config, with_masks=True).weights == {
        "focal": 1.0,
        "consistency": 0.0,
        "weather": 0.0,
        "dice": 0.5,
    }
    with caplog.at_level(logging.WARNING):
        assert "dice" not in RoadworkLoss(config, with_masks=False).weights
    assert "no masks" in caplog.text


def test_counts_and_sums_have_the_parts_of_the_weights():
    output, batch = make(9, seed=0)
    for masks in (True, False):
        for experts in (True, False):
            loss = RoadworkLoss(LossConfig(), with_masks=masks, with_experts=experts)
            assert set(loss(output, batch)) == set(loss.count_targets(batch)) == set(loss.weights)


def test_counts_are_rows_with_a_target():
    _, batch = make(5, seed=0)
    batch["label"] = torch.tensor([0, 1, UNLABELLED, 1, 0])
    batch["weather"] = torch.tensor([0, 7, 7, 7, 2])
    batch["mask_known"] = torch.tensor([True, False, False, False, False])
    batch["view_mask"] = torch.tensor(
        [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]
    ).bool()
    loss = RoadworkLoss(LossConfig(), with_masks=True, with_experts=True)
    expected = {"focal": 4, "consistency": 3, "weather": 2, "dice": 1, "balance": 5}
    assert loss.count_targets(batch) == expected


def test_mixed_photos_have_soft_labels_and_views_that_need_not_agree():
    output, batch = make(6, seed=0)
    batch["label"] = torch.tensor([0, 1, UNLABELLED, 1, 0, 1])
    batch["view_mask"][:] = True
    loss = RoadworkLoss(LossConfig(), with_masks=True)
    sums, counts = loss(output, batch), loss.count_targets(batch)
    soft = torch.tensor([0.0, 1.0, 0.0, 0.6, 0.0, 1.0])
    of_two = torch.tensor([False, True, False, True, False, False])
    mixed = Batch(**batch, soft_label=soft, views_of_two=of_two)
    mixed_sums = loss(output, mixed)
    assert loss.count_targets(mixed) == {**counts, "consistency": 4}
    one_photo = ~of_two
    expected = consistency_loss_sum(output.view_logits[one_photo], batch["view_mask"][one_photo])
    torch.testing.assert_close(mixed_sums["consistency"], expected)
    (gradient,) = torch.autograd.grad(mixed_sums["consistency"], output.view_logits)
    assert gradient[of_two].abs().sum() == 0
    softened = focal_loss_sum(output.logits, batch["label"], soft, label_smoothing=0.1)
    assert torch.equal(mixed_sums["focal"], softened)
    assert not torch.equal(mixed_sums["focal"], sums["focal"])
    for part in ("weather", "dice"):
        assert torch.equal(mixed_sums[part], sums[part])


def test_sums_of_shards_make_the_mean_over_all_rows():
    """Uneven ranks, one without any mask or weather: value and gradient equal those of one batch."""
    loss = RoadworkLoss(LossConfig(), with_masks=True, with_experts=True)
    shards = [make(rows, seed) for rows, seed in ((7, 1), (2, 2), (4, 3))]
    shards[1][1]["mask_known"][:] = False
    shards[1][1]["weather"][:] = len(WEATHER)
    whole_output, whole_batch = join(shards)
    whole = total(loss, loss(whole_output, whole_batch), loss.count_targets(whole_batch))
    leaves = [o.logits for o, _ in shards] + [o.mask_logits for o, _ in shards]
    expected = torch.autograd.grad(whole, leaves)

    counts = [loss.count_targets(batch) for _, batch in shards]
    everywhere = {part: sum(c[part] for c in counts) for part in loss.weights}
    parts = [total(loss, loss(output, batch), everywhere) for output, batch in shards]
    torch.testing.assert_close(sum(parts), whole)
    for ours, theirs in zip(torch.autograd.grad(sum(parts), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    means = [total(loss, loss(output, batch), loss.count_targets(batch)) for output, batch in shards]
    assert abs((sum(means) / 3 - whole).item()) > 1e-3  # the mean of per-rank means is another number


@pytest.mark.parametrize("rows", [0, 3])
def test_a_batch_without_targets_is_exactly_zero_and_reaches_every_head(rows):
    output, batch = make(rows, seed=4)
    batch["label"][:] = UNLABELLED
    batch["weather"][:] = len(WEATHER)
    batch["view_mask"][:] = False
    del batch["mask"], batch["mask_known"]
    loss = RoadworkLoss(LossConfig(), with_masks=True)
    sums = loss(output, batch)
    assert {part: value.item() for part, value in sums.items()} == dict.fromkeys(loss.weights, 0.0)
    assert set(loss.count_targets(batch).values()) == {0}
    heads = (output.logits, output.view_logits, output.weather_logits, output.mask_logits)
    for gradient in torch.autograd.grad(sum(sums.values()), heads):
        assert gradient is not None
        assert gradient.abs().sum() == 0


def test_bf16_outputs_and_autocast_are_summed_in_float32():
    output, batch = make(6, seed=5, dtype=torch.bfloat16)
    exact = ModelOutput(
        **{k: v.float() if v.is_floating_point() else v for k, v in output._asdict().items() if v is not None}
    )
    loss = RoadworkLoss(LossConfig(), with_masks=True, with_experts=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = loss(output, batch)
    for part, value in loss(exact, batch).items():
        assert sums[part].dtype == torch.float32
        torch.testing.assert_close(sums[part], value)


def test_an_unknown_part_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown part of the loss 'fokal': did you mean 'focal'"):
        RoadworkLoss(LossConfig(weights={"fokal": 1.0}), with_masks=True)


def test_a_part_of_a_user_is_one_class_and_one_registration(monkeypatch):
    monkeypatch.setattr(PARTS, "_items", dict(PARTS._items))

    @PARTS.register("confidence")
    class Confidence(LossPart):
        """Squared logits of every row."""

        def count(self, batch):
            return len(batch["label"])

        def __call__(self, output, batch):
            return output.logits.float().square().sum()

    assert "confidence" not in RoadworkLoss(LossConfig(), with_masks=True).weights  # where it is named only
    loss = RoadworkLoss(LossConfig(weights={"focal": 0.5, "confidence": 0.1}), with_masks=False)
    assert loss.weights == {"focal": 0.5, "consistency": 0.0, "weather": 0.0, "confidence": 0.1}
    output, batch = make(6, seed=0)
    assert loss.count_targets(batch)["confidence"] == 6
    assert loss(output, batch)["confidence"] == output.logits.square().sum()
