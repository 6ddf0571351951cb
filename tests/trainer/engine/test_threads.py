"""Threads of a process that shares its cores with loaders and other processes."""

import os

import pytest
import torch

from roadwork_dist.trainer.engine.accelerator import share_cores


@pytest.mark.parametrize(("workers", "processes", "expected"), [(0, 1, 8), (3, 1, 5), (1, 2, 3), (9, 1, 1)])
def test_loaders_and_other_processes_get_cores(
    monkeypatch: pytest.MonkeyPatch, workers: int, processes: int, expected: int
) -> None:
    chosen: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    share_cores(workers)
    assert chosen == [expected]


def test_what_the_user_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    share_cores(1)
    assert chosen == []
