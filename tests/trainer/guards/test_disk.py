"""A disk that fills up and a folder that cannot be written end all ranks with a clear line."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.disks import make_read_only, small_file_system
from support.ranks import run, spawn
from support.toy import assert_same_tensors, lines, newest_tensors, toy_config, toy_data
from torch import nn

from roadwork_dist.common.errors import RoadworkError
from roadwork_dist.trainer.trainer import Trainer


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    with small_file_system(tmp_path / "disk", "3m") as folder:
        yield folder


def wide_model() -> nn.Module:
    """A checkpoint of it takes about 0.6 MiB."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 4000), nn.GELU(), nn.Linear(4000, 2))


def train(run_dir: Path) -> str:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = toy_config(run_dir, epochs=3, batch_size=8 // world_size, workers=0)
    try:
        Trainer(wide_model(), config, toy_data(32)).fit()
    except RoadworkError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_is_full_ends_all_ranks_and_the_run_goes_on_with_room(
    small_disk: Path, tmp_path: Path, world_size: int
) -> None:
    run(train, tmp_path / "whole", world_size=world_size)
    run_dir = small_disk / "run"
    (small_disk / "ballast").write_bytes(bytes(1_600_000))
    first, *others = spawn(train, run_dir, world_size=world_size)
    assert first.value is not None, first
    assert first.value.startswith("CheckpointError: checkpoint of step"), first.value
    assert "No space left on device" in first.value
    assert "make room" in first.value
    for other in others:
        assert other.value.startswith("CheckpointError: checkpoint of step")
    (small_disk / "ballast").unlink()
    run(train, run_dir, world_size=world_size)
    assert lines(run_dir) == lines(tmp_path / "whole")
    assert_same_tensors(newest_tensors(run_dir), newest_tensors(tmp_path / "whole"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_read_only_folder_is_refused_by_all_ranks(small_disk: Path, world_size: int) -> None:
    run_dir = small_disk / "run"
    run_dir.mkdir()
    make_read_only(small_disk)
    for message in run(train, run_dir, world_size=world_size):
        assert message.startswith(
            f"ConfigError: output_dir {run_dir} cannot be written to (Read-only file system)"
        )
