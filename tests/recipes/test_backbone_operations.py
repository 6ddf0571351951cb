"""Counting the operations of the detector's backbone."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.detector.backbone import Backbone, build_random
from roadwork_dist.recipes.pretrain import build_task, count_backbone


def test_operations_are_those_of_the_real_views() -> None:
    task = build_task(ExperimentConfig(), mask_head=False)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    views: Any = {"views": torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8), "view_mask": mask}
    assert task.operations(views) == 0  # not known
    task.operations_per_view = 5e9
    assert task.operations(views) == 4 * 5e9
    assert task.operations({"features": torch.zeros(2, 3, 4), "view_mask": mask}) == 0  # nothing is computed


def test_a_network_that_cannot_be_counted_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = build_random("efficientnet_lite0", device=torch.device("cpu"), dtype=torch.float32)
    assert count_backbone(backbone, 64) == backbone.forward_operations(64) > 0

    def looks_at_values(self: Backbone, images: Tensor) -> Tensor:
        return images * float(images.mean())

    monkeypatch.setattr(type(backbone), "_extract", looks_at_values)
    with caplog.at_level(logging.INFO):
        assert count_backbone(backbone, 64) == 0
    assert "no backbone_mfu: the operations of efficientnet_lite0 cannot be counted" in caplog.text
