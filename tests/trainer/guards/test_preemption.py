"""Asked to stop by a signal, at any moment and on any rank, a run saves, reports it and can resume."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import train_with
from support.ranks import run, spawn
from support.toy import (
    NoisyData,
    assert_same_tensors,
    lines,
    newest_tensors,
    stored,
    toy_config,
    toy_data,
    toy_model,
)
from torch import Tensor, nn

from roadwork_dist.cli import main as cli
from roadwork_dist.common.errors import InterruptedRunError
from roadwork_dist.trainer.checkpoint import checkpoint_store
from roadwork_dist.trainer.checkpoint.checkpoint_store import CheckpointStore
from roadwork_dist.trainer.config import CheckpointConfig
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.guards.preemption import INTERRUPTED, STOP_SIGNALS
from roadwork_dist.trainer.trainer import Trainer

STEPS = 12  # three epochs of four


class Signalled(Callback):
    """Sends a signal to its own process, or to its whole process group, after a step of one rank."""

    def __init__(self, rank: int, step: int, number: int, *, group: bool = False) -> None:
        self.rank, self.step, self.number, self.group = rank, step, number, group

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step == self.step and self.rank in (-1, run.accelerator.process_index):
            if self.group:  # from outside, as a scheduler does
                subprocess.run(
                    ["kill", f"-{self.number}", "--", f"-{os.getpgid(0)}"], check=True, start_new_session=True
                )
            else:
                os.kill(os.getpid(), self.number)


class InValidation(Callback):
    """Sends SIGUSR1 to the last rank in the validation of an epoch."""

    def __init__(self, epoch: int = 1) -> None:
        self.epoch = epoch

    def on_validation_start(self, run: Any) -> None:
        if (
            run.state.epoch == self.epoch
            and run.accelerator.process_index == run.accelerator.num_processes - 1
        ):
            os.kill(os.getpid(), signal.SIGUSR1)


class Drawing(nn.Module):
    """Adds noise in eval mode too, as Monte-Carlo dropout does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


def model() -> nn.Module:
    """With everything that a validation might change: batch statistics and the random state."""
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.3), Drawing(), nn.Linear(16, 2)
    )


class SignalledWhileRead:
    """Validation rows; the first time that one of them is read, its reader gets SIGTERM."""

    pure = True

    def __init__(self, row: int, marker: Path) -> None:
        self.base, self.row, self.marker = toy_data(9, seed=2), row, marker

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, row: int) -> Any:
        if row == self.row and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return self.base[row]


def train(
    run_dir: Path, observer: Callback | None = None, workers: int = 1, signalled_row: int | None = None
) -> str:
    """The error's text, or nothing when training ended by itself."""
    if isinstance(observer, Signalled) and observer.group:
        os.setpgid(0, 0)
    config = toy_config(run_dir, epochs=3, batch_size=4, workers=workers, checkpoint=CheckpointConfig())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = Trainer(
        model(),
        config,
        NoisyData(16 * world),
        toy_data(9, seed=2)
        if signalled_row is None
        else SignalledWhileRead(signalled_row, run_dir / "signalled"),
        callbacks=[observer] if observer else [],
    )
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    try:
        trainer.fit()
    except InterruptedRunError as error:
        return str(error)
    finally:
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    return ""


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("undisturbed")
    run(train, folder, world_size=request.param)
    return request.param, lines(folder), newest_tensors(folder)


@pytest.mark.parametrize(
    ("observer", "step"),
    [
        (Signalled(0, 5, signal.SIGTERM), 6),
        (Signalled(-1, 5, signal.SIGUSR1), 6),
        (Signalled(0, 5, signal.SIGTERM, group=True), 6),
        (Signalled(0, STEPS - 1, signal.SIGTERM), STEPS),
        (InValidation(), 8),
    ],
    ids=["one rank", "all ranks", "with the workers", "last step", "validation"],
)
def test_asked_to_stop_all_ranks_save_and_go_on_later(
    undisturbed: Any, observer: Callback, step: int, tmp_path: Path
) -> None:
    world_size, expected_lines, expected_tensors = undisturbed
    messages = run(train, tmp_path, observer, world_size=world_size)
    assert len(messages) == world_size
    for message in messages:
        assert f"state saved at step {step} of {STEPS}" in message
    note = json.loads((tmp_path / INTERRUPTED).read_text())
    assert note["step"] == step
    assert note["signal"] in ("SIGTERM", "SIGUSR1")
    newest = CheckpointStore(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.name == f"step-{step:08d}"
    run(train, tmp_path, world_size=world_size)
    assert not (tmp_path / INTERRUPTED).exists()
    assert lines(tmp_path) == expected_lines
    assert_same_tensors(newest_tensors(tmp_path), expected_tensors)


@pytest.mark.parametrize("row", [0, 4, 8], ids=lambda row: f"row {row}")
def test_a_validation_is_given_up_behind_its_batch_and_done_anew(
    undisturbed: Any, row: int, tmp_path: Path
) -> None:
    """With two processes rank 0 has two batches and rank 1 has one, which waits for the other's answer."""
    world_size, expected_lines, expected_tensors = undisturbed
    messages = run(train, tmp_path, None, 0, row, world_size=world_size)
    assert [f"state saved at step 4 of {STEPS}" in message for message in messages] == [True] * world_size
    is_over = row == (8 if world_size == 1 else 4)  # read in the last round of batches
    assert sum(line["kind"] == "val" for line in lines(tmp_path)) == is_over
    # Asked again in the same validation (or the next one), it saves over the same step.
    (again,) = set(run(train, tmp_path, InValidation(epoch=int(is_over)), world_size=world_size))
    assert f"state saved at step {8 if is_over else 4} of {STEPS}" in again
    run(train, tmp_path, world_size=world_size)
    assert lines(tmp_path) == expected_lines
    assert_same_tensors(newest_tensors(tmp_path), expected_tensors)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_validation_with_sharded_weights_is_given_up_too(engine: str, tmp_path: Path) -> None:
    """Its forward passes gather the weights, so the shorter rank runs fillers in the rounds of the other."""
    folder, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    disturbed.mkdir()
    run(train_with, engine, train, folder, world_size=2)
    messages = run(train_with, engine, train, disturbed, None, 0, 8, world_size=2)
    assert [f"state saved at step 4 of {STEPS}" in message for message in messages] == [True, True]
    run(train_with, engine, train, disturbed, world_size=2)
    assert lines(disturbed) == lines(folder)
    ours, theirs = (stored(path / "checkpoints" / f"step-{STEPS:08d}") for path in (disturbed, folder))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def train_and_signal_while_saving(run_dir: Path) -> str:
    seal = checkpoint_store._seal

    def disturbed(folder: Path, files: checkpoint_store.Files) -> None:
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        seal(folder, files)

    checkpoint_store._seal = disturbed
    return train(run_dir, Signalled(0, 2, signal.SIGTERM))


def test_more_signals_while_saving_change_nothing(tmp_path: Path) -> None:
    (message,) = run(train_and_signal_while_saving, tmp_path)
    assert "state saved at step 3 of" in message
    newest = CheckpointStore(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.name == "step-00000003"


def train_with_own_handler(run_dir: Path) -> list[int]:
    calls: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    train(run_dir, Signalled(0, 2, signal.SIGTERM))
    assert calls == []  # while training it is the run's
    os.kill(os.getpid(), signal.SIGTERM)
    return calls


def test_own_handlers_are_back_behind_training(tmp_path: Path) -> None:
    assert run(train_with_own_handler, tmp_path) == [[signal.SIGTERM]]


def test_before_training_a_signal_does_what_it_always_does(tmp_path: Path) -> None:
    (end,) = spawn(die_before_training, tmp_path)
    assert end.code == -signal.SIGTERM


def die_before_training(run_dir: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Trainer(toy_model(), toy_config(run_dir), toy_data(16))
    os.kill(os.getpid(), signal.SIGTERM)


def test_off_the_main_thread_training_works_without_handlers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(toy_model(), toy_config(tmp_path, epochs=1), toy_data(16))
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert trainer.state.epoch == 1
    assert "not training in the main thread" in caplog.text


class AskedWithoutASignal(Callback):
    """Asks once, as a budget of hours might."""

    def on_step_end(self, run: Any, result: Any) -> None:
        run.interrupt_requested = run.state.step == 1


def test_asked_without_a_signal_fit_called_again_goes_on(tmp_path: Path) -> None:
    config = toy_config(tmp_path, epochs=1, batch_size=4)
    trainer = Trainer(toy_model(), config, toy_data(16), callbacks=[AskedWithoutASignal()])
    with pytest.raises(InterruptedRunError, match=r"asked to stop: state saved at step 2 of 4"):
        trainer.fit()
    assert json.loads((tmp_path / INTERRUPTED).read_text())["signal"] is None


def test_the_command_ends_with_75(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(command: str, arguments: list[str]) -> int:
        raise InterruptedRunError("asked to stop: state saved at step 3")

    monkeypatch.setattr(cli, "_run", asked)
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    try:
        assert cli.main(["pretrain"]) == cli.EXIT_ASKED_TO_STOP == 75
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert capsys.readouterr().err == "asked to stop: state saved at step 3\n"


READER = """
import sys, time
from roadwork_dist.trainer.feed.loader import load_batches

class Slow:
    pure = True
    def __len__(self): return 4
    def __getitem__(self, row):
        print("reading", flush=True)
        time.sleep(float(sys.argv[1]))
        return row

for batch in load_batches(Slow(), [[0], [1]], workers=1):
    print("read", flush=True)
"""


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def read_with_worker(seconds: float) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen([sys.executable, "-c", READER, str(seconds)], stdout=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    (worker,) = workers_of(process)
    return process, worker


def test_a_worker_outlives_signals_but_not_its_trainer() -> None:
    process, worker = read_with_worker(0.2)
    for number in STOP_SIGNALS:
        os.kill(worker, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.count("read\n") == 2

    process, worker = read_with_worker(60)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{worker}").exists()
