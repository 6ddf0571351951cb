"""Two runs do not share a folder, and a dead run does not block the next one."""

import json
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.ranks import run, spawn
from support.toy import toy_config, toy_data, toy_model

from roadwork_dist.common import flock
from roadwork_dist.common.errors import RunLockedError
from roadwork_dist.common.process_identity import ProcessIdentity, is_alive, own_identity
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.guards import lock as lock_module
from roadwork_dist.trainer.guards.lock import LOCK, FolderLock, Owner
from roadwork_dist.trainer.trainer import Trainer

ELSEWHERE = Owner(ProcessIdentity("node17", 4711, "123", "another boot"), "2026-05-01T03:00:00+00:00")


class StartAnother(Callback):
    """Starts a second run in the same folder, in processes of its own, while the first trains."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.messages: list[Any] = []

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step == 1:
            self.messages = [e.error for e in spawn(train, run.run_dir, world_size=self.world_size)]


def train(run_dir: Path) -> None:
    Trainer(toy_model(), toy_config(run_dir, epochs=1), toy_data(32)).fit()


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_second_run_refuses_on_all_ranks_naming_the_first(tmp_path: Path, world_size: int) -> None:
    other = StartAnother(world_size)
    Trainer(toy_model(), toy_config(tmp_path, epochs=1), toy_data(32), callbacks=[other]).fit()
    assert len(other.messages) == world_size
    for message in other.messages:
        assert (
            f"{tmp_path} is in use by process {os.getpid()} on host {own_identity().host}, started 20"
            in message
        )
        assert "RunLockedError" in message
    assert not (tmp_path / LOCK).exists()
    train(tmp_path)  # and now it is free


def die_holding_it(run_dir: Path) -> None:
    FolderLock(run_dir).acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_leaves_the_folder_free(tmp_path: Path) -> None:
    (end,) = spawn(die_holding_it, tmp_path)
    assert end.code == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    started = time.monotonic()
    FolderLock(tmp_path).acquire()
    assert time.monotonic() - started < lock_module.SILENCE_S  # nobody waits on the same machine


def die_before_its_child(run_dir: Path) -> None:
    """Like a trainer whose loader process is in the middle of a row."""
    FolderLock(run_dir).acquire()
    if os.fork() == 0:
        time.sleep(1)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_child_that_outlives_its_killed_run_is_waited_for(tmp_path: Path) -> None:
    spawn(die_before_its_child, tmp_path)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text()) == asdict(lock.owner)


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flock, "HAS_FLOCK", False)


def test_without_flock_the_owners_process_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch)
    first = FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(RunLockedError, match=f"process {os.getpid()} on host"):
        FolderLock(tmp_path).acquire()
    first.release()
    # The number was given to another process since.
    again = replace(first.owner, process=replace(first.owner.process, started="1"))
    (tmp_path / LOCK).write_text(json.dumps(asdict(again)))
    FolderLock(tmp_path).acquire()


@pytest.mark.parametrize("age", [0, -86_400, 86_400], ids=["now", "clock behind", "clock ahead"])
def test_an_owner_on_another_machine_is_dead_when_it_goes_silent(tmp_path: Path, age: int) -> None:
    (tmp_path / LOCK).write_text(json.dumps(asdict(ELSEWHERE)))
    stamp = time.time() + age
    os.utime(tmp_path / LOCK, (stamp, stamp))
    started = time.monotonic()
    FolderLock(tmp_path, silence=0.5, touch_every=0.1).acquire()
    assert time.monotonic() - started >= 0.5


@pytest.mark.parametrize("goes_backwards", [False, True])
def test_an_owner_on_another_machine_that_touches_its_lock_is_alive(
    tmp_path: Path, goes_backwards: bool
) -> None:
    path = tmp_path / LOCK
    path.write_text(json.dumps(asdict(ELSEWHERE)))
    ended = threading.Event()

    def touch() -> None:
        stamp = time.time()
        while not ended.wait(0.1):
            stamp += -3600 if goes_backwards else 0.1
            os.utime(path, (stamp, stamp))

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(RunLockedError, match="in use by process 4711 on host node17, started 2026-05-01"):
            FolderLock(tmp_path, silence=20, touch_every=0.1).acquire()
    finally:
        ended.set()
        thread.join()


def test_an_owner_touches_its_lock_and_notices_a_thief(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, touch_every=0.02)
    lock.acquire()
    os.utime(tmp_path / LOCK, (0, 0))
    while (tmp_path / LOCK).stat().st_mtime == 0:
        time.sleep(0.01)
    (tmp_path / LOCK).write_text(json.dumps(asdict(ELSEWHERE)))
    while lock.lost_to is None:
        time.sleep(0.01)
    assert lock.lost_to == ELSEWHERE
    lock.release()
    assert (tmp_path / LOCK).exists()  # it is the thief's


class Robbed(Callback):
    """Another run takes over the folder at the second step."""

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step == 2:
            guard = next(c for c in run.callbacks if type(c).__name__ == "RunLock")
            guard.lock.lost_to = ELSEWHERE


def test_a_run_whose_folder_was_taken_over_stops_writing(tmp_path: Path) -> None:
    config = toy_config(tmp_path, epochs=1, batch_size=4)
    with pytest.raises(RunLockedError, match="was taken over by process 4711 on host node17"):
        Trainer(toy_model(), config, toy_data(32), callbacks=[Robbed()]).fit()
    assert not (tmp_path / "checkpoints" / "step-00000004").exists()


@pytest.mark.parametrize("content", ["", "{", '{"process": 3}'])
def test_a_lock_whose_owner_died_while_writing_it_is_nobodys(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text()) == asdict(lock.owner)


def test_a_process_is_told_from_another_of_the_same_number() -> None:
    me = own_identity()
    assert is_alive(me)
    assert not is_alive(replace(me, started="1"))
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    zombie = replace(me, pid=pid, started=start)
    assert not is_alive(zombie)
    os.waitpid(pid, 0)
    assert not is_alive(zombie)


def race(run_dir: Path) -> bool:
    try:
        FolderLock(run_dir).acquire()
    except RunLockedError:
        return False
    time.sleep(1.5)
    return True


def test_of_two_that_start_at_once_one_trains(tmp_path: Path) -> None:
    assert sorted(run(race, tmp_path, world_size=2)) == [False, True]
