"""Operations counted, and worked out."""

import pytest
import torch
from torch import nn

from roadwork_dist.config.experiment import BackboneConfig
from roadwork_dist.detector.backbone import Backbone, build_random
from roadwork_dist.detector.backbone.flops import (
    VIT_H_PLUS,
    VisionTransformer,
    count_operations,
    training_operations,
)


def meta(name: str, dtype: torch.dtype = torch.bfloat16) -> Backbone:
    return build_random(name, device=torch.device("meta"), dtype=dtype, attention="sdpa")


def test_a_matrix_product_is_two_operations_a_multiplication() -> None:
    left, right = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
    assert count_operations(lambda: left @ right) == 2 * 3 * 5 * 7


def test_the_large_backbone_costs_what_the_formula_says() -> None:
    backbone = meta("dinov3_vith16plus")
    assert sum(p.numel() for p in backbone.parameters()) == VIT_H_PLUS.parameters
    assert VIT_H_PLUS.tokens(512) == 1029
    counted = backbone.forward_operations(512)
    assert counted == VIT_H_PLUS.forward_operations(512)
    assert counted / 1e12 == pytest.approx(1.90, abs=0.005)  # a view
    assert 12 * counted / 1e12 == pytest.approx(22.8, abs=0.05)  # a photo


def test_the_formula_holds_without_a_gate_and_on_a_real_device() -> None:
    small = VisionTransformer(
        width=384, blocks=12, hidden=1536, gated=False, patch=16, extra_tokens=5, parameters=21_600_000
    )
    backbone = build_random("dinov3_vits16", device=torch.device("cpu"), dtype=torch.float32)
    before = [p.clone() for p in backbone.parameters()]
    assert backbone.forward_operations(64) == small.forward_operations(64)
    assert all(torch.equal(p, was) for p, was in zip(backbone.parameters(), before, strict=True))


def test_counting_leaves_the_attention_as_it_was() -> None:
    backbone = meta("dinov3_vits16")
    backbone.network.config._attn_implementation = "flash_attention_2"  # cannot run here, nor be counted
    assert backbone.forward_operations(64) > 0
    assert backbone.network.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("name", ["efficientnet_lite0", "convnextv2_base"])
def test_convolutions_are_counted(name: str) -> None:
    assert meta(name, torch.float32).forward_operations(224) > 5e8


def test_forward_and_backward_are_what_the_counter_sees() -> None:
    layers = nn.Sequential(*(nn.Linear(16, 16, bias=False, device="meta") for _ in range(4)))
    inputs = torch.empty(8, 16, device="meta")
    forward = count_operations(lambda: layers(inputs))

    def both() -> None:
        layers(inputs.requires_grad_()).sum().backward()

    assert count_operations(both) == training_operations(forward, 1.0) == 3 * forward
    assert training_operations(forward, 0.5) == 2 * forward
    assert training_operations(forward, 0.0) == forward
    assert training_operations(forward, 1.0, weights_learn=False) == 2 * forward


@pytest.mark.parametrize(("trainable", "factor"), [("none", 1.0), ("last_n", 1 + 2 * 3 / 12), ("all", 3.0)])
def test_a_backbone_knows_what_its_training_costs(trainable: str, factor: float) -> None:
    backbone = meta("dinov3_vits16", torch.float32)
    config = BackboneConfig(trainable=trainable, last_n=3, dtype="fp32")  # type: ignore[arg-type]
    backbone.apply_config(config, torch.device("meta"))
    assert backbone.training_operations(64) == pytest.approx(factor * backbone.forward_operations(64))
