"""Trackers: JSON lines, TensorBoard, Weights & Biases, the console."""

import hashlib
import io
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole
from support.ranks import run
from support.toy import toy_config, toy_data, toy_model
from torch.distributed import HashStore, destroy_process_group, init_device_mesh, init_process_group
from torch.distributed.fsdp import fully_shard

from roadwork_dist.common.errors import (
    ConfigError,
    InterruptedRunError,
    MissingDependencyError,
    RoadworkError,
)
from roadwork_dist.common.yaml import to_yaml
from roadwork_dist.trainer.config import TrackingConfig, TrainConfig, WandbConfig
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.events.state import StepResult, TrainState
from roadwork_dist.trainer.tracking.console import Console
from roadwork_dist.trainer.tracking.jsonl import JsonLines
from roadwork_dist.trainer.tracking.run_folder import make_run_folder
from roadwork_dist.trainer.tracking.tensorboard import TensorBoard
from roadwork_dist.trainer.tracking.wandb import WeightsAndBiases
from roadwork_dist.trainer.trainer import Trainer

RESULT = StepResult(
    loss=0.75,
    parts={"focal": 0.5, "dice": 0.25},
    grad_norm=1.5,
    lr=1e-3,
    rows=32,
    seconds=0.5,
    data_wait=0.25,
)


def fake_run(folder: Path, **state: Any) -> Any:
    """What callbacks see of a Trainer, on its main process."""
    return SimpleNamespace(
        run_dir=folder,
        config=TrainConfig(output_dir=str(folder), epochs=3),
        state=TrainState(**({"step": 1} | state)),
        accelerator=SimpleNamespace(is_main_process=True, num_processes=1, device=torch.device("cpu")),
        model=toy_model(),
        total_steps=30,
        steps_per_epoch=10,
        sample_ids=lambda rows: [f"photo-{row}" for row in rows],
    )


def read(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_holds_every_figure_of_a_step(tmp_path: Path) -> None:
    writer, fake = JsonLines(), fake_run(tmp_path, step=7, epoch=2)
    writer.on_step_end(fake, RESULT)
    writer.on_fit_end(fake)
    (line,) = read(tmp_path)
    assert line.pop("memory_mb") > 100
    assert line == {
        "kind": "train",
        "step": 7,
        "epoch": 2,
        "loss": 0.75,
        "loss/focal": 0.5,
        "loss/dice": 0.25,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "samples_per_s": 64.0,
        "data_wait": 0.25,
    }


def test_figures_that_are_not_finite_are_text_and_skips_name_the_samples(tmp_path: Path) -> None:
    writer, fake = JsonLines(), fake_run(tmp_path)
    bad = {"loss": float("nan"), "grad_norm": float("inf"), "parts": {"focal": float("-inf")}}
    writer.on_step_end(fake, replace(RESULT, **bad, skipped=True, bad_rows=[3, 5]))
    writer.on_fit_end(fake)
    (line,) = read(tmp_path)
    assert line["kind"] == "skip"
    assert (line["loss"], line["grad_norm"], line["loss/focal"]) == ("nan", "inf", "-inf")
    assert line["samples"] == ["photo-3", "photo-5"]


def test_a_resumed_file_loses_what_comes_again(tmp_path: Path) -> None:
    first, fake = JsonLines(), fake_run(tmp_path)
    first.on_step_end(fake, RESULT)
    state = first.state_dict()
    fake.state.step = 2
    first.on_step_end(fake, RESULT)
    first.on_fit_end(fake)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "tra')  # killed in the middle of a line
    second = JsonLines()
    second.load_state_dict(state)
    second.on_step_end(fake, replace(RESULT, loss=0.1))
    second.on_fit_end(fake)
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [(1, 0.75), (2, 0.1)]


def test_a_file_that_lost_lines_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = JsonLines()
    writer.load_state_dict({"offset": 999})
    writer.on_step_end(fake_run(tmp_path), RESULT)
    writer.on_fit_end(fake_run(tmp_path))
    assert "has 0 bytes, the checkpoint expects 999: lines are missing" in caplog.text


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(
        RoadworkError, match=r"metrics\.jsonl cannot be written \(Is a directory\): free space"
    ):
        JsonLines().on_step_end(fake_run(tmp_path), RESULT)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    fake = fake_run(tmp_path)
    fake.accelerator.is_main_process = False
    for observer in (JsonLines(), TensorBoard(), Console()):
        observer.on_train_start(fake)
        observer.on_step_end(fake, RESULT)
        observer.on_validation_end(fake, {"mcc": 0.5}, True)
        observer.on_fit_end(fake)
    assert not list(tmp_path.iterdir())


def test_the_run_folder_holds_the_resolved_config(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "a" / "run", epochs=1)
    Trainer(toy_model(), config, toy_data(16)).fit()
    assert (tmp_path / "a" / "run" / "config.yaml").read_text() == to_yaml(config)
    assert not list(tmp_path.glob("a/run/.*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written to \(.*\): choose another with --output_dir"):
        make_run_folder(tmp_path / "file")


class StopAt(Callback):
    """Ends a run as a kill would, at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Any, result: StepResult) -> None:
        if run.state.step == self.step:
            raise KeyboardInterrupt


class AskInValidation(Callback):
    """Asks to stop in the first validation."""

    def on_validation_start(self, run: Any) -> None:
        run.interrupt_requested = run.state.epoch == 0


def wait_for_another_second() -> None:
    """Event files are read in the order of their names: the second, then a count, of which 10 is before 9."""
    time.sleep(1.05)


def scalars(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    return events


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    def train(*callbacks: Callback) -> None:
        config = toy_config(tmp_path, epochs=2, tracking=TrackingConfig(tensorboard=True))
        Trainer(toy_model(), config, toy_data(64), toy_data(8), callbacks=callbacks).fit()

    with pytest.raises(KeyboardInterrupt):
        train(StopAt(7))  # steps 5 to 7 are in the events, the last checkpoint is of step 6
    wait_for_another_second()
    train()
    events = scalars(tmp_path)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    by_step = {line["step"]: line for line in read(tmp_path) if line["kind"] == "train"}
    got = events.Scalars("train/loss")
    assert [event.step for event in got] == list(range(1, 9))
    for event in got:
        assert event.value == pytest.approx(by_step[event.step]["loss"], rel=1e-6)
    assert [event.step for event in events.Scalars("val/mcc")] == [4, 8]
    names = {"loss", "loss/cross_entropy", "lr", "grad_norm", "samples_per_s", "data_wait", "memory_mb"}
    assert {f"train/{name}" for name in names} <= set(events.Tags()["scalars"])


def test_tensorboard_keeps_the_step_before_a_validation_that_was_given_up(tmp_path: Path) -> None:
    def train(*callbacks: Callback) -> None:
        config = toy_config(tmp_path, epochs=2, tracking=TrackingConfig(tensorboard=True))
        Trainer(toy_model(), config, toy_data(64), toy_data(80), callbacks=callbacks).fit()

    with pytest.raises(InterruptedRunError):
        train(AskInValidation())
    wait_for_another_second()
    train()
    events = scalars(tmp_path)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("val/mcc")] == [4, 8]


def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'roadwork-dist\[wandb\]'"):
        WeightsAndBiases(WandbConfig(mode="offline"))


def train_with_wandb(folder: Path) -> None:
    tracking = TrackingConfig(progress=False, wandb=WandbConfig(mode="offline", project="test"))
    Trainer(toy_model(), toy_config(folder, epochs=1, tracking=tracking), toy_data(32), toy_data(8)).fit()


def test_the_id_of_wandb_is_random_and_stays_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[str] = []

    class Wandb:
        def init(self, **settings: Any) -> Any:
            ids.append(settings["id"])
            return SimpleNamespace(log=lambda *_, **__: None, finish=lambda **_: None)

    monkeypatch.setattr("roadwork_dist.trainer.tracking.wandb.require", lambda *_, **__: Wandb())
    for place in ("one", "two"):
        for epochs in (1, 2):
            tracking = TrackingConfig(progress=False, wandb=WandbConfig(mode="online"))
            config = toy_config(tmp_path / place / "run", epochs=epochs, tracking=tracking)
            Trainer(toy_model(), config, toy_data(32)).fit()
    assert ids[0] == ids[1] != ids[2] == ids[3]
    (tmp_path / "one/run/wandb-id").unlink()  # as of version 0.1, which hashed the path
    Trainer(toy_model(), toy_config(tmp_path / "one/run", epochs=3, tracking=tracking), toy_data(32)).fit()
    assert ids[4] == hashlib.sha256(str(tmp_path / "one/run").encode()).hexdigest()[:16]


def test_wandb_offline_is_one_run_for_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run(train_with_wandb, tmp_path, world_size=2)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    content = log.read_bytes()
    for name in (b"train/loss", b"train/grad_norm", b"val/mcc", b"accumulation"):
        assert name in content


def show(console: Console, folder: Path, terminal: bool) -> str:
    text = io.StringIO()
    console._console = RichConsole(
        file=text, force_terminal=terminal, width=120, highlight=False, markup=False, soft_wrap=True
    )
    fake = fake_run(folder)
    console.on_train_start(fake)
    for step in range(1, 11):
        fake.state.step = step
        console.on_step_end(fake, RESULT)
    console.on_validation_end(fake, {"loss": 0.5, "loss/focal": 0.1, "mcc": 0.9}, True)
    fake.state.should_stop, fake.state.stale_validations = True, 5
    console.on_fit_end(fake)
    return text.getvalue()


def test_without_a_terminal_progress_is_plain_lines(tmp_path: Path) -> None:
    text = show(Console(), tmp_path, terminal=False)
    assert "\x1b" not in text
    assert "\r" not in text
    start, step, validation, end = text.splitlines()  # one line in ten seconds, not one a step
    assert start == f"training Sequential: 3 epochs x 10 steps on 1 x cpu → {tmp_path}"
    assert step == "epoch 1 step 1/30 loss 0.7500 lr 1.00e-03 64 samples/s wait 25%"
    assert validation == "epoch   1  val  loss 0.5000  mcc 0.9000  *"
    assert end == "stopped early: no better mcc in 5 validations"


def test_a_sharded_model_keeps_its_name(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        fully_shard(run.model, mesh=init_device_mesh("cpu", (1,)))
    finally:
        destroy_process_group()
    console, text = Console(), io.StringIO()
    console._console = RichConsole(file=text, soft_wrap=True)
    console.on_train_start(run)
    assert text.getvalue().startswith("training Sequential: ")


def test_on_a_terminal_progress_is_a_live_bar(tmp_path: Path) -> None:
    text = show(Console(), tmp_path, terminal=True)
    assert "\x1b[" in text
    for shown in ("epoch 1", "10/30", "loss 0.7500", "wait 25%", "left", "mcc 0.9000"):
        assert shown in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


def test_an_error_gives_the_terminal_back(tmp_path: Path) -> None:
    console, text = Console(), io.StringIO()
    console._console = RichConsole(file=text, force_terminal=True)
    console.on_train_start(fake_run(tmp_path))
    console.on_exception(fake_run(tmp_path), KeyboardInterrupt())
    assert text.getvalue().rstrip("\n").endswith("\x1b[?25h")
