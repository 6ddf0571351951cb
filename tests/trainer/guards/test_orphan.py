"""Ranks do not outlive a killed launcher."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support.ranks import spawn
from support.toy import toy_config, toy_data, toy_model

from roadwork_dist.common.errors import InterruptedRunError
from roadwork_dist.common.process_identity import ProcessIdentity, is_alive, own_identity
from roadwork_dist.trainer.checkpoint.checkpoint_store import CheckpointStore
from roadwork_dist.trainer.engine import launcher
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.trainer import Trainer


class TellStep(Callback):
    """Writes where the run is, and takes its time or hangs."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_end(self, run: Any, result: Any) -> None:
        (run.run_dir / "first").touch()
        time.sleep(self.seconds)


def launch_and_die(run_dir: Path, seconds: float, launched: bool) -> None:
    """A launcher that starts a rank and dies after the rank's first step, without signalling it."""
    if os.fork() == 0:
        launcher.LOOK_EVERY_S, launcher.GRACE_S = 0.05, 1.0
        if launched:
            os.environ["TORCHELASTIC_RUN_ID"] = "none"
        code = 0
        try:
            config = toy_config(run_dir, epochs=1, batch_size=1)
            Trainer(toy_model(), config, toy_data(40), callbacks=[TellStep(seconds)]).fit()
        except InterruptedRunError:
            code = 75
        (run_dir / "code").write_text(str(code))
        os._exit(code)
    while not (run_dir / "first").exists():
        time.sleep(0.01)
    os._exit(0)


def end_of_orphan(run_dir: Path) -> int:
    while not (run_dir / "code").exists():
        time.sleep(0.02)
    time.sleep(0.05)
    return int((run_dir / "code").read_text())


def test_an_orphan_saves_and_leaves(tmp_path: Path) -> None:
    spawn(launch_and_die, tmp_path, 0.05, True)
    assert end_of_orphan(tmp_path) == 75
    note = json.loads((tmp_path / "interrupted.json").read_text())
    newest = CheckpointStore(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.name == f"step-{note['step']:08d}"
    assert 1 <= note["step"] < 40


def test_what_no_launcher_started_outlives_its_shell(tmp_path: Path) -> None:
    spawn(launch_and_die, tmp_path, 0.01, False)
    assert end_of_orphan(tmp_path) == 0


def test_an_orphan_that_hangs_is_ended(tmp_path: Path) -> None:
    spawn(launch_and_die, tmp_path, 60, True)
    process = ProcessIdentity(**json.loads((tmp_path / "run.lock").read_text())["process"])
    while is_alive(process):
        time.sleep(0.05)
    assert not (tmp_path / "code").exists()


def die_before_the_meeting(run_dir: Path) -> None:
    """The launcher is gone while its rank still waits for a peer that never comes."""
    read, write = os.pipe()
    if os.fork() == 0:
        launcher.LOOK_EVERY_S = 0.05
        os.environ |= {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
        (run_dir / "pid").write_text(json.dumps(asdict(own_identity())))
        os.write(write, b"x")
        Trainer(toy_model(), toy_config(run_dir), toy_data(40))
    os.read(read, 1)
    os._exit(0)


def test_an_orphan_that_waits_for_its_peers_is_ended(tmp_path: Path) -> None:
    spawn(die_before_the_meeting, tmp_path)
    process = ProcessIdentity(**json.loads((tmp_path / "pid").read_text()))
    deadline = time.monotonic() + 60
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(process)
