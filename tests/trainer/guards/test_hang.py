"""A hanging rank is named within the configured time, wherever it hangs."""

import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.ranks import RankExit, spawn
from support.toy import lines, toy_config, toy_data, toy_model
from torch import Tensor, nn

from roadwork_dist.trainer.config import CheckpointConfig
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.guards.hang import EXIT_HANG, HangWatch, verdict
from roadwork_dist.trainer.guards.heartbeat import Heartbeat, blame, read_heartbeats, write_heartbeat
from roadwork_dist.trainer.trainer import Trainer

RANK = "RANK"


class HangingData:
    """The ninth row never comes in one of the ranks."""

    pure = True

    def __init__(self, rank: int) -> None:
        self.base, self.rank, self.reads = toy_data(32), rank, 0

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, row: int) -> Any:
        self.reads += 1
        if os.environ.get(RANK, "0") == str(self.rank) and self.reads == 9:
            time.sleep(60)
        return self.base[row]


class Hangs(Callback):
    """Hangs after the third step of one rank, like a hanging file system or a stopped process."""

    def __init__(self, rank: int, how: str) -> None:
        self.rank, self.how = rank, how

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step == 3 and run.accelerator.process_index == self.rank:
            if self.how == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            self.hang_here()

    def hang_here(self) -> None:
        time.sleep(60)


class HangingModel(nn.Module):
    """Hangs in the forward pass of one rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.inner, self.rank, self.calls = toy_model(), rank, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3 and os.environ[RANK] == str(self.rank):
            time.sleep(60)
        return self.inner(inputs)


def train(run_dir: Path, moment: str, rank: int, workers: int = 0) -> None:
    import logging

    logging.basicConfig(filename=str(run_dir / f"log-{os.environ.get(RANK, '0')}"))
    data: Any = HangingData(rank) if moment == "loads" else toy_data(32)
    model = HangingModel(rank) if moment == "computes" else toy_model()
    observers = [Hangs(rank, moment)] if moment in ("stops", "observes") else []
    config = toy_config(
        run_dir,
        epochs=1,
        batch_size=4,
        hang_timeout=1.0,
        workers=workers,
        checkpoint=CheckpointConfig(every_steps=1),
    )
    Trainer(model, config, data, callbacks=observers).fit()


def logged(run_dir: Path) -> list[str]:
    text = "".join(path.read_text() for path in sorted(run_dir.glob("log-*")))
    return [line for line in text.splitlines() if "no progress" in line]


@pytest.mark.parametrize(
    ("moment", "workers", "where"),
    [
        ("loads", 0, r"test_hang.py:\d+ in __getitem__ < "),
        ("loads", 1, r"dataloader.py:\d+ in "),
        ("computes", 0, r"test_hang.py:\d+ in forward < "),
        ("observes", 0, r"test_hang.py:\d+ in hang_here < "),
        ("stops", 0, ""),
    ],
)
def test_the_rank_that_hangs_is_named(tmp_path: Path, moment: str, workers: int, where: str) -> None:
    rank = 0 if moment == "observes" else 1
    exits = spawn(train, tmp_path, moment, rank, workers, world_size=2, timeout=30)
    assert EXIT_HANG in [e.code for e in exits], exits
    (line,) = logged(tmp_path)  # one for all ranks
    assert re.search(
        rf"no progress for 1 s: rank {rank} \(host \S+, process \d+, last step \d, \w+\) in ", line
    ), line
    assert re.search(where, line), line
    assert "; rank" not in line  # nobody else
    assert ("no sign of life" in line) == (moment == "stops")
    assert list((tmp_path / "health").glob("rank-*.stacks.txt"))
    if moment != "loads":
        assert list((tmp_path / "checkpoints").glob("step-*"))


def test_one_process_names_itself(tmp_path: Path) -> None:
    (end,) = spawn(train, tmp_path, "loads", 0)
    assert end.code == EXIT_HANG
    assert "rank 0 (host" in logged(tmp_path)[0]
    assert "in __getitem__" in logged(tmp_path)[0]
    assert "in __getitem__" in (tmp_path / "health" / "rank-0.stacks.txt").read_text()


class Suspended(Callback):
    """Stopped for longer than the timeout, then continued, as a suspended job is."""

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step == 2:
            if (child := os.fork()) == 0:
                time.sleep(2.5)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.waitpid(child, 0)


def train_suspended(run_dir: Path) -> int:
    config = toy_config(run_dir, epochs=1, batch_size=4, hang_timeout=1.0)
    return Trainer(toy_model(), config, toy_data(32), callbacks=[Suspended()]).fit().state.step


def test_a_suspended_job_goes_on(tmp_path: Path) -> None:
    (end,) = spawn(train_suspended, tmp_path)
    assert end == RankExit(0, 8)


def train_slowly(run_dir: Path) -> int:
    """Takes longer than the timeout, mostly in a validation, but makes progress all the time."""

    class Slow(HangingData):
        def __getitem__(self, row: int) -> Any:
            time.sleep(0.1)
            return self.base[row]

    config = toy_config(run_dir, epochs=1, batch_size=4, hang_timeout=1.0)
    return Trainer(toy_model(), config, toy_data(8), Slow(0)).fit().state.step


def test_a_long_validation_is_no_hang(tmp_path: Path) -> None:
    (end,) = spawn(train_slowly, tmp_path)
    assert end == RankExit(0, 2)


def heartbeat(
    rank: int, beat: int = 0, batches: int = 7, where: str = "/x/torch/distributed/c10d.py:3 in all_reduce"
) -> Heartbeat:
    return Heartbeat(rank, f"node{rank}", 100 + rank, beat, 6, batches, "training", [where])


def test_who_is_to_blame() -> None:
    before = [heartbeat(rank) for rank in range(4)]
    now = [heartbeat(rank, beat=2) for rank in range(4)]
    assert blame(before, now)[0] == [0, 1, 2, 3]
    assert blame(before, [*now[:2], before[2], now[3]])[0] == [2]
    assert blame([*before[:3], None], [*now[:3], None])[0] == [3]
    assert blame(before, [*now[:3], heartbeat(3, 2, where="/x/data.py:3 in read")])[0] == [3]
    assert blame(before, [heartbeat(0, 2, batches=6), *now[1:]])[0] == [0]
    # The validation of rank 0 is shorter; it waits for rank 1, which reads.
    reads = heartbeat(1, 2, batches=9, where="/x/data.py:3 in read")
    assert blame(before[:2], [heartbeat(0, 2, batches=8), reads])[0] == [1]
    assert blame(before[:1], [heartbeat(0, 2)])[0] == [0]


def test_the_line_stays_short_on_many_ranks() -> None:
    ranks = range(1000)
    line = verdict(
        [heartbeat(r) for r in ranks], [heartbeat(r, beat=1) for r in ranks], 480, Path("runs/x/health")
    )
    assert line.count("host") == 8
    assert "and 992 more" in line
    assert "torch" not in line or "distributed/c10d.py:3 in all_reduce" in line


def test_heartbeats_are_read_back_and_torn_ones_skipped(tmp_path: Path) -> None:
    write_heartbeat(tmp_path, heartbeat(0))
    (tmp_path / "rank-1.json").write_text("{")
    assert read_heartbeats(tmp_path, 3) == [heartbeat(0), None, None]
    assert json.loads((tmp_path / "rank-0.json").read_text())["host"] == "node0"


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics, lock, watch, checkpoints and their pruning while the time of day runs backwards."""
    now = [time.time()]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    Trainer(toy_model(), toy_config(tmp_path / "steady", epochs=4, batch_size=8), toy_data(32)).fit()
    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(time, "time_ns", lambda: int(backwards() * 1e9))
    config = toy_config(tmp_path / "backwards", epochs=4, batch_size=8, hang_timeout=5.0)
    seen = OldFiles()
    Trainer(toy_model(), config, toy_data(32), callbacks=[seen]).fit()
    assert lines(tmp_path / "backwards") == lines(tmp_path / "steady")
    names = [
        sorted(p.name for p in (tmp_path / run / "checkpoints").iterdir()) for run in ("steady", "backwards")
    ]
    assert names[0] == names[1]
    for line in (tmp_path / "backwards" / "metrics.jsonl").read_text().splitlines():
        figures = json.loads(line)
        assert figures.get("samples_per_s", 1) > 0
        assert 0 <= figures.get("data_wait", 0) <= 1


class Standing:
    """What the watch reads of a run; the run hangs, or takes a step between two checks."""

    def __init__(self, run_dir: Path, moves: bool) -> None:
        self.run_dir, self.moves, self.batches_read = run_dir, moves, 0
        self.accelerator = SimpleNamespace(process_index=0, num_processes=1)

    @property
    def state(self) -> Any:
        self.batches_read += self.moves
        return SimpleNamespace(step=self.batches_read)


@pytest.mark.parametrize("moves", [True, False])
def test_the_stack_of_a_run_that_moves_is_not_read(tmp_path: Path, moves: bool) -> None:
    watch = HangWatch(timeout=60.0)
    watch.interval = 0.05
    watch.on_fit_start(Standing(tmp_path, moves))
    try:
        deadline = time.monotonic() + 30
        (seen,) = read_heartbeats(tmp_path / "health", 1)
        while time.monotonic() < deadline and (seen is None or seen.beat < 3):
            time.sleep(0.01)
            (seen,) = read_heartbeats(tmp_path / "health", 1)
    finally:
        watch.on_fit_end(Standing(tmp_path, moves))
    assert seen is not None
    assert (seen.where == []) == moves


class OldFiles(Callback):
    """Gives newer checkpoints older dates, as a file system does whose clock runs backwards."""

    def on_step_end(self, run: Any, result: Any) -> None:
        for path in (run.run_dir / "checkpoints").glob("step-*"):
            stamp = 1e9 - int(path.name.removeprefix("step-"))
            os.utime(path, (stamp, stamp))
