"""Several Trainers in one process: pre-train then fine-tune, folds, sweeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import train_with
from support.ranks import run
from support.toy import toy_config, toy_data
from torch import Tensor, nn

from roadwork_dist import OptimConfig, TrackingConfig, Trainer


class BlockA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.linear(x)
        return out


class BlockB(BlockA):
    """Another class of repeated blocks, which FSDP2 shards by."""


def net(block: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(block(), block()), nn.Linear(6, 2))


CHANGES: dict[str, dict[str, Any]] = {
    "batch": {"batch_size": 4},
    "clip": {"optim": OptimConfig(lr=0.01, clip=0.1)},
    "precision": {"precision": "bf16"},
    "model": {"block": BlockB},
}


def fit(run_dir: Path, *, block: type[nn.Module] = BlockA, **changes: Any) -> Tensor:
    settings = {"epochs": 1, "batch_size": 8, "tracking": TrackingConfig(progress=False)} | changes
    trainer = Trainer(net(block), toy_config(run_dir, **settings), toy_data(64)).fit()
    whole = trainer.engine.whole_state()
    return torch.cat([tensor.flatten() for tensor in whole.values()]) if whole else torch.zeros(0)


def one_after_the_other(run_dir: Path) -> dict[str, Tensor]:
    """Weights of three and more Trainers of one process, between which the first one comes again."""
    found = {"first": fit(run_dir / "first")}
    for name, changes in CHANGES.items():
        found[name] = fit(run_dir / name, **changes)
    return found | {"again": fit(run_dir / "again")}


def alone(run_dir: Path, name: str) -> Tensor:
    return fit(run_dir, **CHANGES.get(name, {}))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero3"])
def test_a_trainer_does_not_know_those_before_it(tmp_path: Path, engine: str) -> None:
    together = run(train_with, engine, one_after_the_other, tmp_path / "together", world_size=2)[0]
    assert torch.equal(together["first"], together["again"])
    for name in ("batch", "model"):
        expected = run(train_with, engine, alone, tmp_path / "alone" / name, name, world_size=2)[0]
        torch.testing.assert_close(
            together[name], expected, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
