"""Loss spikes: detected by all ranks, then skipped, rewound or reported."""

import hashlib
import json
import os
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.ranks import run, spawn
from support.toy import NoisyData, assert_same_tensors, lines, newest_tensors, toy_config, toy_model

from roadwork_dist.common.errors import ConfigError, InterruptedRunError, LossSpikeError
from roadwork_dist.trainer.callbacks.spikes import SpikeJudge, robust_z
from roadwork_dist.trainer.config import CheckpointConfig, SpikeConfig
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.task import ClassificationTask, TaskOutput
from roadwork_dist.trainer.trainer import Trainer

SPIKE = 11  # of 16 steps; checkpoints at 4, 8, 12 and 16


class SpikingTask(ClassificationTask):
    """The loss of the last rank is a thousand times as large in chosen steps."""

    def __init__(self, spikes: range) -> None:
        self.spikes, self.step = spikes, 1

    def __call__(self, model: Any, batch: Any) -> TaskOutput:
        output = super().__call__(model, batch)
        is_last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        factor = 1000.0 if model.training and is_last and self.step in self.spikes else 1.0
        return TaskOutput({part: factor * value for part, value in output.sums.items()}, output.rows)


class Moments(Callback):
    """Sets the task's step and records the weights after each step; may request a stop or crash after one."""

    def __init__(self, task: SpikingTask, moment: str) -> None:
        self.task, self.moment = task, moment
        self.seen: dict[int, str] = {}  # digest of weights, moments and averages

    def on_train_start(self, run: Any) -> None:
        self.task.step = run.state.step + 1

    def on_step_end(self, run: Any, result: Any) -> None:
        step = run.state.step
        self.task.step = step + 1
        tensors = run.engine.weights() | run.engine.moments() | run.tensors()
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].detach().numpy().tobytes())
        self.seen[step] = digest.hexdigest()
        if self.moment == f"asked at {step}":
            run.interrupt_requested = True
        if self.moment == f"killed at {step}":
            os._exit(9)


def train(run_dir: Path, action: str, moment: str = "", spikes: range = range(SPIKE, SPIKE + 1)) -> Any:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = toy_config(
        run_dir,
        batch_size=8 // world_size,
        checkpoint=CheckpointConfig(every_steps=4, keep=1),
        spike=SpikeConfig(action=action, window=6, threshold=8.0),  # type: ignore[arg-type]
        max_nonfinite_steps=3,
    )
    task = SpikingTask(spikes)
    observer = Moments(task, moment)
    trainer = Trainer(toy_model(dropout=0.3), config, NoisyData(64), task=task, callbacks=[observer])
    try:
        trainer.fit()
    except (LossSpikeError, InterruptedRunError) as error:
        return str(error), observer.seen
    return "", observer.seen


def kinds(run_dir: Path) -> dict[int, str]:
    return {line["step"]: line["kind"] for line in lines(run_dir) if line["kind"] in ("train", "skip")}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_spike_on_one_rank_is_skipped_by_all(tmp_path: Path, world_size: int) -> None:
    results = run(train, tmp_path, "skip", world_size=world_size)
    assert kinds(tmp_path) == {n: "skip" if n == SPIKE else "train" for n in range(1, 17)}
    for _, seen in results:
        assert seen[SPIKE] == seen[SPIKE - 1] != seen[SPIKE + 1]
        assert seen == results[0][1]
    (told,) = [line for line in lines(tmp_path) if line["kind"] == "spike"]
    assert told["step"] == SPIKE
    assert told["height"] > 8


@pytest.mark.parametrize("world_size", [1, 2])
def test_rewinding_goes_back_to_the_last_checkpoint_and_passes_its_rows_over(
    tmp_path: Path, world_size: int
) -> None:
    whole = tmp_path / "whole"
    for _, seen in run(train, whole, "rewind", world_size=world_size):
        assert seen[SPIKE] == seen[8] != seen[SPIKE - 1]
    assert kinds(whole) == {n: "skip" if n == SPIKE else "train" for n in range(1, 17)}
    # The steps after it train on their own rows, at their own learning rates, from the older weights.
    run(train, tmp_path / "skip", "skip", world_size=world_size)
    rates = [
        [(line["step"], line["lr"]) for line in lines(folder) if line["kind"] == "train"]
        for folder in (whole, tmp_path / "skip")
    ]
    assert rates[0] == rates[1]
    moments = ["killed at 11", "asked at 10"]
    if world_size == 1:
        moments += ["killed at 10", "asked at 9", "asked at 11"]
    for moment in moments:
        folder = tmp_path / moment
        if "killed" in moment:
            assert 9 in [end.code for end in spawn(train, folder, "rewind", moment, world_size=world_size)]
        else:
            messages = [text for text, _ in run(train, folder, "rewind", moment, world_size=world_size)]
            assert all("asked to stop: state saved" in text for text in messages)
        run(train, folder, "rewind", world_size=world_size)
        assert lines(folder) == lines(whole), moment
        assert_same_tensors(newest_tensors(folder), newest_tensors(whole))


def train_without_checkpoints(run_dir: Path, moment: str = "") -> dict[int, str]:
    config = toy_config(
        run_dir,
        epochs=1,
        batch_size=4,
        checkpoint=CheckpointConfig(),
        spike=SpikeConfig(action="rewind", window=3),
    )
    task = SpikingTask(range(6, 7))
    observer = Moments(task, moment)
    with suppress(InterruptedRunError):
        Trainer(toy_model(), config, NoisyData(64), task=task, callbacks=[observer]).fit()
    return observer.seen


def test_rewinding_before_the_first_checkpoint_only_skips(tmp_path: Path) -> None:
    seen = train_without_checkpoints(tmp_path)
    assert seen[6] == seen[5] != seen[7]


def test_a_stop_before_the_first_checkpoint_is_none_to_go_back_to(tmp_path: Path) -> None:
    whole = train_without_checkpoints(tmp_path / "whole")
    before = train_without_checkpoints(tmp_path / "asked", "asked at 3")
    behind = train_without_checkpoints(tmp_path / "asked")
    assert before | behind == whole
    assert 3 < min(behind) < 6


@pytest.mark.parametrize("world_size", [1, 2])
def test_stopping_tells_on_all_ranks(tmp_path: Path, world_size: int) -> None:
    for message, seen in run(train, tmp_path, "stop", world_size=world_size):
        assert f"the loss of step {SPIKE} is" in message
        assert "robust standard deviations above the last 6 (spike.threshold 8), 1 in a row" in message
        assert max(seen) == 10
    newest = max((tmp_path / "checkpoints").glob("step-*"))
    assert newest.name == "step-00000008"


@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_losses_that_stay_high_are_an_error(tmp_path: Path, action: str) -> None:
    ((message, _),) = run(train, tmp_path, action, "", range(SPIKE, 99))
    assert "the loss of step 13 is" in message
    assert "3 in a row" in message


def test_off_takes_every_step_and_stores_nothing(tmp_path: Path) -> None:
    run(train, tmp_path, "off")
    assert set(kinds(tmp_path).values()) == {"train"}
    state = json.loads((max((tmp_path / "checkpoints").glob("step-*")) / "state.json").read_text())
    assert state["callbacks"]["SpikeGuard"] == {}


def test_the_height_of_a_spike_worked_out_by_hand() -> None:
    # Median 3, deviations 2 1 0 1 2, their median 1.
    assert robust_z(3 + 1.4826 * 7, [1, 2, 3, 4, 5]) == pytest.approx(7)
    assert robust_z(0, [1, 2, 3, 4, 5]) < 0
    assert robust_z(1.001, [1.0] * 9) == pytest.approx(1)  # equal losses: a thousandth of the median


def test_a_window_has_to_be_full_and_spikes_do_not_enter_it() -> None:
    judge = SpikeJudge(window=3, threshold=5)
    for loss in (1.0, 1.1):
        assert not judge.is_spike(1e9)
        judge.accept(loss)
    judge.accept(0.9)
    assert judge.is_spike(1e9)
    assert not judge.is_spike(float("nan"))
    judge.accept(float("inf"))
    again = SpikeJudge(window=3, threshold=5)
    again.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    assert again.state_dict() == {"losses": [1.0, 1.1, 0.9]}


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=30), st.floats(0.1, 100), st.floats(0.5, 20))
def test_the_height_does_not_depend_on_the_unit_of_the_loss(
    losses: list[float], loss: float, unit: float
) -> None:
    scaled = robust_z(unit * loss, [unit * each for each in losses])
    assert scaled == pytest.approx(robust_z(loss, losses), rel=1e-6, abs=1e-6)
    assert (robust_z(loss, losses) > 0) == (loss > statistics.median(losses))


@pytest.mark.parametrize(("name", "value"), [("window", 1), ("threshold", 0.0)])
def test_wrong_settings_are_told(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"spike.{name} is"):
        SpikeConfig(**{name: value})  # type: ignore[arg-type]
