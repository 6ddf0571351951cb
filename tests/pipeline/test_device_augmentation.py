"""Online training whose views are augmented after the copy to the device, simulated on the CPU."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support.photos import small_experiment, write_small_set
from support.ranks import run
from support.toy import lines

from roadwork_dist.recipes import data, pretrain

OVERRIDES = (
    *("--features.mode=online", "--epochs=1", "--eval.report=false", "--eval.bootstrap=100"),
    *("--workers=1", "--views.policy=global", "--model.prune_keep=1.0", "--augment.strength=2"),
    *("--model.dropout=0", "--model.metadata_dropout=0", "--backbone.dtype=fp32"),
)

TOLERANCE = 2e-4


def train(photos: Path, run_dir: Path, on_device: bool, *overrides: str) -> None:
    plain_way: Callable[..., Any] = data.photo_views

    def photo_views(*arguments: Any, augment: bool) -> Any:
        views = plain_way(*arguments, augment=augment)
        assert not views.on_device, "there is no GPU in this test"
        return replace(views, on_device=on_device and augment)

    data.photo_views = photo_views
    pretrain.run_experiment(small_experiment(photos, run_dir, *OVERRIDES, *overrides))


def test_training_sees_the_same_views(tmp_path: Path) -> None:
    photos = write_small_set(tmp_path / "photos")
    for name, on_device in (("loader", False), ("device", True)):
        run(train, photos, tmp_path / name, on_device)
    in_loader, by_device = (_losses(tmp_path / name) for name in ("loader", "device"))
    # A value of a view in ten thousand is rounded the other way; views left as they are: 3e-2.
    torch.testing.assert_close(by_device, in_loader, rtol=0, atol=TOLERANCE)


def _losses(run_dir: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in lines(run_dir) if "loss" in line], dtype=torch.float64)
