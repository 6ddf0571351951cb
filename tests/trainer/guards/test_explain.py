"""A killed loader process and a lost rank are reported in one line on every rank; the run can resume."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run, spawn
from support.toy import NoisyData, assert_same_tensors, lines, newest_tensors, toy_config, toy_model
from torch import Tensor, nn

from roadwork_dist.common.errors import LoaderWorkerError, LostPeerError, RoadworkError
from roadwork_dist.trainer.guards.explain import explained
from roadwork_dist.trainer.trainer import Trainer


class KilledData(NoisyData):
    """The loader process of rank 0 is killed at a row, as the kernel does when memory runs out."""

    def __init__(self, at: int) -> None:
        super().__init__(48)
        self.left = at

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left == 0 and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def train(run_dir: Path, at: int = 0) -> tuple[str, str]:
    config = toy_config(run_dir, epochs=2, batch_size=4, workers=1)
    try:
        Trainer(toy_model(dropout=0.3), config, KilledData(at)).fit()
    except RoadworkError as error:
        return type(error).__name__, str(error)
    return "", ""


class PartlyUsed(nn.Module):
    """Two layers, of which the loss uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs)


def train_partly(run_dir: Path) -> tuple[str, str]:
    try:
        Trainer(PartlyUsed(), toy_config(run_dir, epochs=1), NoisyData(64)).fit()
    except RoadworkError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_weights_that_the_loss_does_not_use_are_named(tmp_path: Path) -> None:
    assert run(train_partly, tmp_path / "alone") == [("", "")]
    for end in spawn(train_partly, tmp_path / "together", world_size=2):
        name, line = end.value
        assert name == "ConfigError"
        assert "(number 2, 3 of the model's parameters that require one, counted from 0): freeze" in line


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_loader_process_is_one_clear_line_and_the_run_goes_on(
    tmp_path: Path, world_size: int
) -> None:
    run(train, tmp_path / "whole", world_size=world_size)
    killed, *others = spawn(train, tmp_path / "killed", 18, world_size=world_size)
    assert killed.value, killed
    name, line = killed.value
    assert name == "LoaderWorkerError"
    assert line.startswith("loader process ")
    assert "was ended by signal: Killed, most likely by the kernel because memory ran out" in line
    assert "lower workers" in line
    for other in others:
        assert other.value[0] == "LostPeerError"
        assert other.value[1].startswith("another rank has ended (")
    assert list((tmp_path / "killed" / "checkpoints").glob("step-*"))
    run(train, tmp_path / "killed", world_size=world_size)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert_same_tensors(newest_tensors(tmp_path / "killed"), newest_tensors(tmp_path / "whole"))


def test_what_torch_says_is_explained() -> None:
    error = RuntimeError("DataLoader worker (pid(s) 17, 18) exited unexpectedly")
    error.__cause__ = RuntimeError(
        "DataLoader worker (pid 17) is killed by signal: Bus error. It is possible …"
    )
    told = explained(error)
    assert isinstance(told, LoaderWorkerError)
    assert "loader process 17, 18 was ended by signal: Bus error, /dev/shm is probably full" in str(told)
    gloo = (
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4"
    )
    assert isinstance(explained(RuntimeError(gloo)), LostPeerError)


def test_other_errors_stay_as_they_are() -> None:
    for error in (ValueError("x"), RuntimeError("shape mismatch"), RuntimeError("Connection reset by peer")):
        assert explained(error) is error
