"""Custom callbacks: what they can do, and how their state is saved."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.ranks import run
from support.toy import Stop, StopAt, toy_config, toy_data, toy_model

from roadwork_dist import Callback, EmaConfig, TrackingConfig, Trainer
from roadwork_dist.common.errors import ConfigError


def trainer_of(run_dir: Path, *callbacks: Callback, **changes: Any) -> Trainer:
    settings = {"ema": EmaConfig(enabled=False), "tracking": TrackingConfig(progress=False)} | changes
    config = toy_config(run_dir, **settings)
    return Trainer(toy_model(), config, toy_data(64), toy_data(16, seed=2), callbacks=callbacks)


class Veto(Callback):
    """Refuses the second step."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def vetoes(self, run: Any, loss: float) -> bool:
        self.asked.append(loss)
        return len(self.asked) == 2


class Results(Callback):
    def __init__(self) -> None:
        self.results: list[Any] = []
        self.weights: list[torch.Tensor] = []

    def on_step_end(self, run: Any, result: Any) -> None:
        self.results.append(result)
        self.weights.append(run.model[0].weight.detach().clone())


def test_a_vetoed_step_moves_nothing_and_does_not_count_as_not_finite(tmp_path: Path) -> None:
    veto, seen = Veto(), Results()
    trainer = trainer_of(tmp_path, veto, seen, epochs=1, max_nonfinite_steps=1).fit()
    assert [result.vetoed for result in seen.results] == [False, True, False, False]
    assert [result.skipped for result in seen.results] == [False, True, False, False]
    assert torch.equal(seen.weights[0], seen.weights[1])
    assert not torch.equal(seen.weights[1], seen.weights[2])
    assert veto.asked == [result.loss for result in seen.results]
    assert trainer.state.step == 4


class Zeros(Callback):
    """Validates with zeros in place of the weights, as an average of another kind would."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    @contextmanager
    def validation_weights(self, run: Any) -> Iterator[None]:  # type: ignore[override]
        held = {name: tensor.clone() for name, tensor in run.engine.weights().items()}
        for tensor in run.engine.weights().values():
            tensor.detach().zero_()
        run.engine.weights_changed()
        try:
            yield
        finally:
            for name, tensor in run.engine.weights().items():
                tensor.detach().copy_(held[name])
        run.engine.weights_changed()

    def on_validation_start(self, run: Any) -> None:
        self.seen.append(self._all_zero(run))

    def on_validation_end(self, run: Any, metrics: Any, improved: bool) -> None:
        self.seen.append(self._all_zero(run))

    def on_epoch_end(self, run: Any) -> None:
        self.seen.append(self._all_zero(run))

    def _all_zero(self, run: Any) -> bool:
        return all(not tensor.any() for tensor in run.engine.weights().values())


def fit_with_zeros(run_dir: Path) -> tuple[list[bool], bool]:
    zeros = Zeros()
    trainer = trainer_of(run_dir, zeros, epochs=1).fit()
    with trainer.averaged():
        return zeros.seen, zeros._all_zero(trainer)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_callback_gives_the_weights_to_validate_and_export(tmp_path: Path, ranks: int) -> None:
    for seen, within in run(fit_with_zeros, tmp_path, world_size=ranks):
        assert seen == [True, True, False]
        assert within
    assert all(not tensor.any() for tensor in load_file(tmp_path / "best/model.safetensors").values())


def test_two_callbacks_with_weights_to_validate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="EmaCallback and Zeros give weights to validate with, expected one"
    ):
        trainer_of(tmp_path, Zeros(), ema=EmaConfig(decay=0.9), epochs=1).fit()


class Counter(Callback):
    def __init__(self) -> None:
        self.count, self.moved, self.afresh = 0, torch.zeros(2), False

    def on_step_end(self, run: Any, result: Any) -> None:
        self.count += 1
        self.moved += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"moved": self.moved}

    def load_tensors(self, source: Any) -> None:
        source.read({"moved": self.moved})

    def on_no_tensors(self) -> None:
        self.afresh = True


class Renamed(Counter):
    former_keys = ("Counter",)


class Unrelated(Counter):
    key = "unrelated"


def stopped_at_three(run_dir: Path, *callbacks: Callback) -> None:
    with pytest.raises(Stop):
        trainer_of(run_dir, *callbacks, StopAt(3)).fit()


@pytest.mark.parametrize("kind", [Counter, Renamed])
def test_state_is_found_under_the_key_or_a_former_one(
    kind: type[Counter], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_at_three(tmp_path, Counter())
    again = kind()
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path, again).fit()
    assert (again.count, again.moved.tolist(), again.afresh) == (8, [8, 8], False)
    assert "callbacks that this run does not have" not in caplog.text
    assert "no state of" not in caplog.text


def test_state_without_its_callback_and_the_other_way_round_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_at_three(tmp_path, Counter())
    other = Unrelated()
    with caplog.at_level(logging.WARNING):
        trainer_of(tmp_path, other).fit()
    assert "this run does not have; the next checkpoint will not contain it: Counter" in caplog.text
    assert "the checkpoint holds no state of unrelated: starting without it" in caplog.text
    assert (other.count, other.afresh) == (6, True)  # from the checkpoint at step 2


def test_an_average_that_is_switched_on_later_starts_from_the_weights_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_at_three(tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of(tmp_path, ema=EmaConfig(decay=0.9, warmup=False))
        start = StartWeights()
        trainer.callbacks.append(start)
        trainer.fit()
    assert "no state of EmaCallback: starting without it" in caplog.text
    assert start.same


class StartWeights(Callback):
    """Whether the average equals the weights when training starts."""

    same = False

    def on_train_start(self, run: Any) -> None:
        own = run.model[0].weight.detach().clone()
        assert run.state.step == 2
        with run.averaged():
            self.same = torch.equal(own, run.model[0].weight)


def test_two_callbacks_with_one_key_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Counter and Counter, keep their state under the key 'Counter'.*`key`"
    ):
        trainer_of(tmp_path, Counter(), Counter())
    trainer_of(tmp_path, Counter(), Unrelated(), Veto(), Veto())  # without state they need no key
