"""Throughput, step times, memory, MFU, and the slowest rank."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import run
from support.toy import Stop, StopAt, toy_config, toy_data, toy_model
from torch import Tensor, nn

from roadwork_dist.trainer.config import TrackingConfig
from roadwork_dist.trainer.task import ClassificationTask
from roadwork_dist.trainer.tracking.console import health_text
from roadwork_dist.trainer.tracking.health import RankHealth, _Step, health_figures, straggler
from roadwork_dist.trainer.trainer import Trainer

RANK = RankHealth(waited=0.1, worked=0.3, allocated=900, reserved=1200, peak=1000, operations=2e12)


def steps(*seconds: float) -> list[_Step]:
    return [_Step(s, 0.1, 0.3, 64, 2e12) for s in seconds]


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def health_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read(folder) if line["kind"] == "health"]


def kinds_and_steps(folder: Path) -> list[tuple[str, int]]:
    told = [(line["kind"], line["step"]) for line in read(folder)]
    return [(kind, step) for kind, step in told if kind in ("train", "health")]


def test_figures_are_those_of_the_window() -> None:
    ranks = [RANK, replace(RANK, waited=0.2, worked=0.5, peak=2000, reserved=3000, allocated=1500)]
    figures = health_figures(steps(*[1.0] * 19, 3.0), ranks, ["a", "b"], peak=10e12)
    assert figures == {
        "steps": 20,
        "samples_per_s": 58.18,  # 20 x 64 rows in 22 s
        "samples_per_s_per_rank": 29.09,
        "data_wait": 0.1364,  # 0.15 s of 1.1 s
        "step_s_p50": 1.0,
        "step_s_p95": 1.1,  # numpy's linear interpolation: 5 % of the way from 1 to 3
        "memory_allocated_mb": 1500,
        "memory_peak_mb": 2000,
        "memory_reserved_mb": 3000,
        "backbone_tflops": 1.8182,  # 2 TFLOP in 1.1 s
        "backbone_mfu": 0.1818,
        "slowest_rank": 1,
        "slowest_host": "b",
        "slowest_share": 0.2727,  # 0.7 s of own work, the other 0.4 s, of 1.1 s
        "slowest_cause": "compute",
    }


def test_what_is_not_known_is_left_out() -> None:
    alone = replace(RANK, reserved=0, operations=0.0)
    figures = health_figures(steps(1.0), [alone], ["a"], peak=1e12)
    assert not {name for name in figures if "reserved" in name or "backbone" in name or "slowest" in name}
    assert "backbone_mfu" not in health_figures(steps(1.0), [RANK], ["a"], peak=None)


def test_the_slowest_rank_is_held_against_the_median_of_the_others() -> None:
    ranks = [replace(RANK, worked=w) for w in (0.3, 0.5, 0.4, 0.1)]
    found = straggler(ranks, ["a", "b", "c", "d"], step_seconds=1.0)
    assert found["slowest_rank"] == 1
    assert found["slowest_share"] == pytest.approx(0.2)  # 0.5 against the median of 0.1, 0.3, 0.4
    ranks[2] = replace(RANK, waited=0.9)
    assert straggler(ranks, ["a", "b", "c", "d"], 1.0)["slowest_cause"] == "data"


def test_a_person_reads_of_a_rank_only_if_it_holds_up_the_others() -> None:
    ranks = [RANK, replace(RANK, worked=0.5)]
    text = health_text(health_figures(steps(1.0), ranks, ["a", "node-7"], peak=4e12))
    assert text == (
        "64 samples/s (32 a rank) · step 1000 ms, p95 1000 · memory 1.0 GiB · backbone MFU 50% · "
        "others wait 20% for rank 1 on node-7 (compute)"
    )
    assert "wait" not in health_text(health_figures(steps(1.0), [RANK, RANK], ["a", "b"], peak=None))


class SlowRows:
    """Rows that take long to read, on one rank."""

    def __init__(self, rows: int, slow: bool) -> None:
        self.base, self.slow = toy_data(rows), slow

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Any:
        if self.slow:
            time.sleep(0.004)
        return self.base[index]


class Slow(torch.autograd.Function):
    """Takes long, in the forward or in the backward pass."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, forward: bool) -> Tensor:
        context.backward_sleeps = not forward
        if forward:
            time.sleep(0.06)
        return inputs.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        if context.backward_sleeps:
            time.sleep(0.06)
        return gradients[0], None


class SlowModel(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.inner, self.where = toy_model(), where

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.inner[0](inputs)
        if self.where in ("forward", "backward"):
            hidden = Slow.apply(hidden, self.where == "forward")
        return self.inner[1:](hidden)


def train_with_a_slow_rank(folder: Path, where: str, slow_rank: int) -> None:
    import os

    slow = int(os.environ["RANK"]) == slow_rank
    # With one micro-batch the only backward pass is the one in which gradients are reduced.
    rows, accumulation = (128, 1) if where == "backward" else (256, 2)
    tracking = TrackingConfig(health_every=2)
    config = toy_config(folder, epochs=1, accumulation=accumulation, tracking=tracking)
    data = SlowRows(rows, slow and where == "data")
    Trainer(SlowModel(where if slow else ""), config, data).fit()


@pytest.mark.parametrize(("where", "slow_rank"), [("data", 1), ("forward", 0), ("backward", 1)])
def test_a_slow_rank_is_found(tmp_path: Path, where: str, slow_rank: int) -> None:
    run(train_with_a_slow_rank, tmp_path, where, slow_rank, world_size=2)
    told = health_lines(tmp_path)
    assert [line["step"] for line in told] == [2, 4]
    line = told[-1]  # the first steps of a process have much else to do
    assert line["slowest_rank"] == slow_rank
    assert line["slowest_cause"] == ("data" if where == "data" else "compute")
    # In each micro-batch the slow rank sleeps 60 ms or more, for which the other one waits.
    assert line["slowest_share"] > 0.4
    assert line["step_s_p50"] > 0.06


def test_each_window_is_told_once_also_after_a_resume(tmp_path: Path) -> None:
    def train(folder: Path, *callbacks: Any) -> None:
        tracking = TrackingConfig(health_every=3, progress=False)
        config = toy_config(folder, epochs=2, tracking=tracking)
        Trainer(toy_model(), config, toy_data(128), callbacks=callbacks).fit()

    train(tmp_path / "whole")
    # Steps 3, 6 and the ends of the epochs, 8 and 16; each behind the line of its step.
    kinds = kinds_and_steps(tmp_path / "whole")
    assert [step for kind, step in kinds if kind == "health"] == [3, 6, 8, 9, 12, 15, 16]
    assert kinds.index(("health", 3)) == kinds.index(("train", 3)) + 1
    with pytest.raises(Stop):
        train(tmp_path / "killed", StopAt(7))
    train(tmp_path / "killed")
    assert kinds_and_steps(tmp_path / "killed") == kinds


class CountedTask(ClassificationTask):
    """Knows what its backbone computes."""

    def operations(self, batch: tuple[Tensor, Tensor]) -> float:
        return 1e9 * len(batch[1])


def train_counted(folder: Path) -> None:
    config = toy_config(folder, epochs=1, accumulation=2, tracking=TrackingConfig(progress=False))
    Trainer(toy_model(), config, toy_data(128), task=CountedTask()).fit()


def test_operations_and_rows_are_those_of_the_steps(tmp_path: Path) -> None:
    run(train_counted, tmp_path, world_size=2)
    (line,) = health_lines(tmp_path)
    assert line["steps"] == 2
    # A giga-operation a row, on this rank half of all rows: so many TFLOP/s as thousands of rows a rank.
    assert line["backbone_tflops"] == pytest.approx(line["samples_per_s_per_rank"] / 1000, rel=1e-3)
    assert "backbone_mfu" not in line  # of a CPU
    assert 50 < line["memory_allocated_mb"] <= line["memory_peak_mb"] + 1
