"""Saved by some processes under one engine, gone on from by others under another."""

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import train_with
from support.ranks import run
from support.toy import Stop, StopAt, lines, stored, toy_config
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.common.random import capture_rng
from roadwork_dist.trainer.config import CheckpointConfig, EmaConfig
from roadwork_dist.trainer.engine.collectives import gather_objects
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.task import ClassificationTask, TaskOutput
from roadwork_dist.trainer.trainer import Trainer

ROWS = 70
"""Steps of 32, 32 and 6 rows an epoch."""
SAVED = 4
"""The step that is saved: the first of the second epoch."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dense = nn.LayerNorm(9), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.dense(self.norm(x)))


def model() -> nn.Module:
    """Odd widths: shards differ in length, and of the last bias a third rank holds nothing."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 9).requires_grad_(False), Block(), Block(), nn.Linear(9, 2))


def data(rows: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, :2].sum(1) > 0).long(), torch.arange(rows))


class RecordingTask(ClassificationTask):
    """Remembers which rows it was trained on."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, forward: Any, batch: Any) -> TaskOutput:
        if torch.is_grad_enabled():
            self.seen += batch[2].tolist()
        return super().__call__(forward, batch[:2])


class Steps(Callback):
    """Rows of each step over all ranks."""

    def __init__(self, task: RecordingTask) -> None:
        self.task = task
        self.rows: dict[int, list[int]] = {}

    def on_step_end(self, run: Any, result: Any) -> None:
        seen, self.task.seen = self.task.seen, []
        self.rows[run.state.step] = [row for share in gather_objects(seen) for row in share]


def fit(run_dir: Path, batch_size: int, stop: bool = False, **changes: Any) -> dict[int, list[int]]:
    """Three epochs, or up to the step behind the one that is saved."""
    task = RecordingTask()
    steps = Steps(task)
    checkpoint = CheckpointConfig(every_steps=SAVED, keep=9)
    config = toy_config(
        run_dir, epochs=3, batch_size=batch_size, patience=0, checkpoint=checkpoint, **changes
    )
    stops = [StopAt(SAVED + 1)] if stop else []
    with suppress(Stop):
        Trainer(model(), config, data(ROWS), data(20), task=task, callbacks=[steps, *stops]).fit()
    return steps.rows


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[int]]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(fit, folder, 32)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run folders that stopped in the second epoch, by engine and processes."""
    known: dict[tuple[str, int], Path] = {}

    def get(engine: str, processes: int) -> Path:
        key = engine, processes
        if key not in known:
            known[key] = tmp_path_factory.mktemp(f"{engine}-{processes}")
            run(train_with, engine, fit, known[key], 32 // processes, True, world_size=processes)
            newest = max(path.name for path in (known[key] / "checkpoints").iterdir())
            assert newest == f"step-{SAVED:08d}"
        return known[key]

    return get


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("ddp", 1), ("ddp", 2)),
        (("ddp", 2), ("ddp", 1)),
        (("ddp", 2), ("ddp", 3)),
        (("ddp", 2), ("fsdp2", 2)),
        (("ddp", 1), ("zero3", 2)),
        (("fsdp2", 2), ("zero3", 2)),
        (("fsdp2", 2), ("fsdp2", 3)),
        (("fsdp2", 2), ("ddp", 1)),
        (("zero3", 2), ("fsdp2", 2)),
        (("zero3", 2), ("zero3", 3)),
        (("zero3", 2), ("ddp", 2)),
    ],
    ids=lambda value: f"{value[0]}-{value[1]}",
)
def test_others_go_on_as_if_nothing_had_happened(
    before: tuple[str, int], after: tuple[str, int], saved: Any, undisturbed: Any, tmp_path: Path
) -> None:
    folder, expected_rows = undisturbed
    shutil.copytree(saved(*before), tmp_path, dirs_exist_ok=True)
    engine, processes = after
    rows = run(train_with, engine, fit, tmp_path, 32 // before[1], world_size=processes)
    # Each step has the rows that it would have had, each of them once.
    assert min(rows[0]) == SAVED + 1
    for step, seen in rows[0].items():
        assert sorted(seen) == sorted(expected_rows[step]), step
    epoch = [row for step in (4, 5, 6) for row in (expected_rows if step == SAVED else rows[0])[step]]
    assert sorted(epoch) == list(range(ROWS))

    for line, expected in zip(lines(tmp_path), lines(folder), strict=True):
        assert {"kind", "step", "epoch"} <= line.keys()
        assert line.get("lr") == expected.get("lr")
        for name, value in expected.items():
            if isinstance(value, float):
                assert line[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (expected["step"], name)
    ours, theirs = (stored(path / "checkpoints" / "step-00000009") for path in (tmp_path, folder))
    assert ours.keys() == theirs.keys()
    assert {name.split("/")[0] for name in ours} == {"model", "optimizer", "callbacks"}
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_another_batch_size_or_accumulation_is_refused(saved: Any) -> None:
    folder = saved("ddp", 2)
    with pytest.raises(CheckpointError, match=r"batch_size was 16, is 8; rows per .* was 32, is 8"):
        fit(folder, 8)
    with pytest.raises(CheckpointError, match=r"accumulation was 1, is 3; rows per .* was 32, is 48"):
        fit(folder, 16, accumulation=3)


def test_the_same_rows_in_other_parts_are_not_another_recipe(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved("ddp", 2), tmp_path, dirs_exist_ok=True)
    fit(tmp_path, 8, accumulation=4)
    assert lines(tmp_path)[-1]["step"] == 9


def test_the_rows_of_a_step_that_are_kept_are_told(
    saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved("ddp", 2), tmp_path, dirs_exist_ok=True)
    with caplog.at_level(logging.INFO, logger="roadwork_dist"):
        fit(tmp_path, 16)
    assert caplog.text.count("keep the 32 rows that it was started with, shared by the 1 processes") == 1


class RandomState(Callback):
    """What the first step would draw."""

    def on_train_start(self, run: Any) -> None:
        self.state = capture_rng()["torch"].sum().item()
        raise Stop


def random_state(run_dir: Path) -> float:
    state = RandomState()
    config = toy_config(run_dir, epochs=3, batch_size=32)
    trainer = Trainer(model(), config, data(ROWS), callbacks=[state])
    trainer.task = RecordingTask()
    with pytest.raises(Stop):
        trainer.fit()
    return float(state.state)


def test_processes_that_join_draw_numbers_of_their_own(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved("ddp", 1), tmp_path, dirs_exist_ok=True)
    states = run(random_state, tmp_path, world_size=3)
    assert len(set(states)) == 3
    assert run(random_state, tmp_path, world_size=3) == states
    assert run(random_state, tmp_path, world_size=2) == states[:2]


def average_at_start(run_dir: Path) -> bool:
    class Compare(Callback):
        def on_train_start(self, run: Any) -> None:
            with run.averaged():
                averaged = [p.detach().clone() for p in run.model.parameters()]
            self.same = all(map(torch.equal, averaged, run.model.parameters()))
            self.moved = not torch.equal(run.model[3].weight, model()[3].weight)
            raise Stop

    compare = Compare()
    config = toy_config(run_dir, epochs=3, ema=EmaConfig(decay=0.9))
    trainer = Trainer(model(), config, data(ROWS), task=RecordingTask(), callbacks=[compare])
    with pytest.raises(Stop):
        trainer.fit()
    return compare.same and compare.moved


def test_an_average_turned_on_later_starts_from_the_weights_gone_on_from(tmp_path: Path) -> None:
    fit(tmp_path, 16, stop=True, ema=EmaConfig(enabled=False))
    assert average_at_start(tmp_path)


def fit_evaluated(run_dir: Path, first: str, stop: bool) -> str:
    """What the model gives, or is given, before it trains must not change who it is."""
    config = toy_config(run_dir, epochs=2, batch_size=16, checkpoint=CheckpointConfig(every_steps=2))
    given = model()
    weights = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    trainer = Trainer(
        given, config, data(ROWS), data(20), task=RecordingTask(), callbacks=[StopAt(2)] if stop else []
    )
    if first == "evaluate":
        trainer.evaluate(data(20))
    if first == "load":
        trainer.load_weights(weights)
    with suppress(Stop):
        trainer.fit()
    return str(trainer.state.epoch)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("first", ["evaluate", "load"])
def test_what_was_sharded_before_training_is_the_same_model(engine: str, first: str, tmp_path: Path) -> None:
    run(train_with, engine, fit_evaluated, tmp_path, first, True, world_size=2)
    assert run(train_with, engine, fit_evaluated, tmp_path, "", False, world_size=2) == ["2", "2"]
