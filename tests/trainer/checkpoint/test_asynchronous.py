"""Saves that are written while training goes on."""

import errno
import json
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import train_with
from support.ranks import run, spawn
from support.toy import Stop, StopAt, assert_same_tensors, lines, stored, toy_config, toy_data, toy_model

from roadwork_dist.common.errors import CheckpointError, InterruptedRunError
from roadwork_dist.trainer.checkpoint import callback, checkpoint_store
from roadwork_dist.trainer.checkpoint.checkpoint_store import CheckpointStore, verify
from roadwork_dist.trainer.checkpoint.tensors import write_tensors
from roadwork_dist.trainer.config import CheckpointConfig
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.guards.preemption import INTERRUPTED
from roadwork_dist.trainer.trainer import Trainer

STEPS = 8


def fit(run_dir: Path, asynchronous: bool, *callbacks: Callback, every: int = 3) -> None:
    """Two epochs of four steps, saved behind steps 3, 4, 6 and 8."""
    checkpoint = CheckpointConfig(every_steps=every, keep=9, asynchronous=asynchronous)
    config = toy_config(run_dir, batch_size=8, checkpoint=checkpoint)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    Trainer(toy_model(0.3), config, toy_data(32 * processes), toy_data(9), callbacks=callbacks).fit()


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"))


class Opens(Callback):
    """Lets the gate open behind a step."""

    def __init__(self, gate: threading.Event, step: int) -> None:
        self.gate, self.step = gate, step

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step == self.step:
            self.gate.set()


def fit_until_gate(run_dir: Path) -> bool:
    """The save behind step 6 is written only when step 7 is done."""
    gate, in_time, calls = threading.Event(), [], iter(range(99))

    def slow(folder: Path, tensors: Any, group: Any = None) -> list[str]:
        if next(calls) == 2:
            in_time.append(gate.wait(timeout=30))
        return write_tensors(folder, tensors, group)

    callback.write_tensors = slow
    fit(run_dir, True, Opens(gate, 7))
    return in_time == [True]


@pytest.mark.parametrize(
    ("engine", "processes"), [("ddp", 1), ("ddp", 2), ("fsdp2", 2)], ids=lambda v: str(v)
)
def test_training_goes_on_and_what_is_written_is_the_state_at_its_step(
    engine: str, processes: int, tmp_path: Path
) -> None:
    run(train_with, engine, fit, tmp_path / "waits", False, world_size=processes)
    assert all(run(train_with, engine, fit_until_gate, tmp_path / "goes on", world_size=processes)), (
        "training waited for the disk"
    )
    names = [path.name for path in checkpoints(tmp_path / "waits")]
    assert names == [f"step-{step:08d}" for step in (3, 4, 6, 8)]
    assert [path.name for path in checkpoints(tmp_path / "goes on")] == names
    for name in names:
        first, second = (tmp_path / folder / "checkpoints" / name for folder in ("waits", "goes on"))
        verify(second)
        assert_same_tensors(stored(first), stored(second))
        states = [json.loads((path / "state.json").read_text()) for path in (first, second)]
        assert states[0]["state"] == states[1]["state"]
    assert lines(tmp_path / "goes on") == lines(tmp_path / "waits")


def test_what_saving_cost_is_told(tmp_path: Path) -> None:
    for asynchronous in (False, True):
        folder = tmp_path / str(asynchronous)
        fit(folder, asynchronous)
        told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        told = [line for line in told if line["kind"] == "checkpoint"]
        assert [line["step"] for line in told] == [3, 4, 6, 8]
        for line, path in zip(told, checkpoints(folder), strict=True):
            files = [file for file in path.iterdir() if file.name != "manifest.json"]
            assert line["bytes"] == sum(file.stat().st_size for file in files)
            assert 0 < line["seconds_blocked"] <= line["seconds_total"]
            assert 0 < line["blocked_share"] <= 1


class Waits(Callback):
    """Lets the save under way end, whatever comes of it, before the next step."""

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step == 7:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join(timeout=30)


def fit_and_fail(run_dir: Path, full: int) -> tuple[str, int, bool]:
    """The disk of one rank is full from the second save on."""
    rank, calls = int(os.environ["RANK"]), iter(range(99))

    def write(folder: Path, value: Any) -> None:
        if rank == full and next(calls) >= 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        torch.save(value, folder)

    callback.write_torch = write
    checkpoint = CheckpointConfig(every_steps=3, asynchronous=True)
    config = toy_config(run_dir, batch_size=8, epochs=50, checkpoint=checkpoint)
    trainer = Trainer(toy_model(), config, toy_data(160), callbacks=[Waits()])
    with pytest.raises(CheckpointError) as caught:
        trainer.fit()
    return str(caught.value), trainer.state.step, trainer.interrupt_requested


@pytest.mark.parametrize("full", [0, 1])
def test_a_failure_in_the_background_ends_the_run_on_all_ranks(full: int, tmp_path: Path) -> None:
    first, second = run(fit_and_fail, tmp_path, full, world_size=2)
    assert first == second
    message, step, still_asked = first
    assert f"rank {full}" in message
    assert "No space left on device" in message
    assert "the last good one is step-00000003" in message
    assert 6 < step <= 8  # behind one of the next steps, not only before the next save
    assert not still_asked
    assert CheckpointStore(tmp_path / "checkpoints").newest() == tmp_path / "checkpoints/step-00000003"
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def fit_and_die_while_writing(run_dir: Path) -> None:
    seal, calls = checkpoint_store._seal, iter(range(99))

    def die(*arguments: Any) -> None:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        seal(*arguments)

    checkpoint_store._seal = die
    fit(run_dir, True)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_while_writing_a_run_ends_like_an_undisturbed_one(processes: int, tmp_path: Path) -> None:
    run(fit, tmp_path / "whole", True, world_size=processes)
    exits = spawn(fit_and_die_while_writing, tmp_path / "killed", world_size=processes)
    assert any(e.code == -signal.SIGKILL for e in exits), exits
    run(fit, tmp_path / "killed", True, world_size=processes)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    first, second = (stored(checkpoints(tmp_path / name)[-1]) for name in ("killed", "whole"))
    assert_same_tensors(first, second)


class AskedBehindTheValidation(Callback):
    def on_validation_end(self, run: Any, metrics: dict[str, float], improved: bool) -> None:
        run.interrupt_requested = True


def test_who_is_asked_to_stop_says_that_all_is_saved_only_when_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_store, "_seal", full)
    config = toy_config(tmp_path, checkpoint=CheckpointConfig(asynchronous=True))
    asked = AskedBehindTheValidation()
    with pytest.raises(CheckpointError, match="No space left on device"):
        Trainer(toy_model(), config, toy_data(64), toy_data(7), callbacks=[asked]).fit()
    assert not (tmp_path / INTERRUPTED).exists()


def fit_and_crash(run_dir: Path) -> None:
    with suppress(Stop):
        fit(run_dir, True, StopAt(7))


def test_a_crash_lets_the_save_under_way_come_to_its_end(tmp_path: Path) -> None:
    run(fit_and_crash, tmp_path, world_size=2)
    newest = CheckpointStore(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.name == "step-00000006"


class AskAt(Callback):
    """Asks to stop in a step."""

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step == 4:
            run.interrupt_requested = True


def fit_and_be_asked(run_dir: Path) -> str:
    with pytest.raises(InterruptedRunError) as caught:
        fit(run_dir, True, AskAt(), every=5)
    newest = CheckpointStore(run_dir / "checkpoints").newest()
    return f"{caught.value} · {newest and newest.name}"


def test_who_is_asked_to_stop_waits_until_all_is_saved(tmp_path: Path) -> None:
    for told in run(fit_and_be_asked, tmp_path, world_size=2):
        assert "state saved at step" in told
        step = told.split("state saved at step ")[1].split()[0]
        assert told.endswith(f"step-{int(step):08d}")
