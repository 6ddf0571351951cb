"""State that training changes without a gradient survives a stop, to the bit."""

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.engines import train_with
from support.ranks import run
from support.toy import Stop, StopAt, assert_same_tensors, toy_config, toy_data
from torch import Tensor, nn

from roadwork_dist import Callback, TrackingConfig, Trainer
from roadwork_dist.common.errors import ConfigError


class Momentum(nn.Module):
    """A target network that a callback moves."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = nn.Linear(6, 2), nn.Linear(6, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.online(x) + 0.5 * self.target(x)
        return out


class MoveTarget(Callback):
    """By whole weights, so that engines that shard see the same values."""

    def on_step_end(self, run: Any, result: Any) -> None:
        if isinstance(run.model, Momentum):
            whole = run.engine.whole_state(["online.weight", "target.weight"])
            moved = [None]
            if whole:
                moved = [whole["target.weight"].lerp(whole["online.weight"], 0.1)]
            if torch.distributed.is_initialized():
                torch.distributed.broadcast_object_list(moved, 0)
            run.engine.put_whole(run.model.target.weight, moved[0])


class Counting(nn.Module):
    """Each kind of state that is no parameter, none of which a plain checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6).eval()
        self.register_buffer("mean", torch.zeros(6), persistent=False)
        self.register_buffer("flat", torch.zeros(1, 1).expand(1, 6))
        self.shift = torch.zeros(6)
        self.seen = 0
        self.torch_draws = torch.Generator().manual_seed(3)
        self.numpy_draws = np.random.default_rng(3)
        self.old_numpy_draws = np.random.Generator(np.random.MT19937(3))
        self.python_draws = random.Random(3)

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "list": [torch.tensor(self.seen)]}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
                self.shift = self.shift.lerp(x.mean(0), 0.1)
                self.norm.running_mean.lerp_(x.mean(0), 0.1)  # type: ignore[union-attr]
                self.flat = self.flat + 0.01
        drawn = (
            float(self.numpy_draws.random())
            + self.python_draws.random()
            + float(self.old_numpy_draws.random())
        )
        noise = torch.rand(x.shape, generator=self.torch_draws).to(x.device) * 0.1 * drawn
        out: Tensor = self.linear(self.norm(x) - self.mean - self.shift + self.flat + noise) * (
            1 + 1 / (1 + self.seen)
        )
        return out


MODELS = {"momentum": Momentum, "counting": Counting}


def trained(run_dir: Path, kind: str, stop: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(5)
    config = toy_config(run_dir, epochs=2, batch_size=8, tracking=TrackingConfig(progress=False))
    callbacks = [MoveTarget(), *([StopAt(stop)] if stop else [])]
    trainer = Trainer(MODELS[kind](), config, toy_data(64), toy_data(16, seed=2), callbacks=callbacks)
    if stop:
        with pytest.raises(Stop):
            trainer.fit()
        return {}
    trainer.fit()
    return trainer.engine.whole_state()


CASES = [("ddp", 1, "momentum"), ("ddp", 1, "counting"), ("ddp", 2, "momentum"), ("ddp", 2, "counting")]
CASES += [(engine, 2, "momentum") for engine in ("fsdp2", "zero2", "zero3")]


@pytest.mark.parametrize(("engine", "ranks", "kind"), CASES)
def test_a_stopped_run_ends_like_an_undisturbed_one(
    tmp_path: Path, engine: str, ranks: int, kind: str
) -> None:
    undisturbed = run(train_with, engine, trained, tmp_path / "whole", kind, world_size=ranks)[0]
    run(train_with, engine, trained, tmp_path / "stopped", kind, 5, world_size=ranks)
    resumed = run(train_with, engine, trained, tmp_path / "stopped", kind, world_size=ranks)[0]
    assert_same_tensors(resumed, undisturbed)


def test_what_is_saved_besides_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trained(tmp_path, "momentum")
    told = [record.message for record in caplog.records if "changed without a gradient" in record.message]
    assert told == ["changed without a gradient, so checkpoints hold them as well: target.weight"]


class Opaque(nn.Linear):
    def get_extra_state(self) -> Any:
        return Path("a folder")

    def set_extra_state(self, state: Any) -> None: ...


def test_extra_state_that_cannot_be_saved_is_refused_before_training(tmp_path: Path) -> None:
    model = nn.Sequential(Opaque(6, 2))
    with pytest.raises(
        ConfigError, match=r"extra state of the module '0' is a \w*Path that a checkpoint cannot"
    ):
        Trainer(model, toy_config(tmp_path), toy_data(16), toy_data(16)).fit()
    assert not list(tmp_path.glob("checkpoints/*"))


class Holder(nn.Module):
    """A buffer of any kind, which counts up in training."""

    def __init__(self, buffer: Tensor, *, persistent: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)
        self.register_buffer("held", buffer, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.held.numel():
            self.held = ~self.held if self.held.dtype == torch.bool else self.held + 1
        out: Tensor = self.linear(x)
        return out


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool]
DTYPES += [torch.complex64]


def laid_out(dtype: torch.dtype, shape: list[int], layout: str) -> Tensor:
    tensor = torch.ones(shape, dtype=dtype)
    if layout == "expanded":
        return torch.ones([1] * len(shape), dtype=dtype).expand(shape)
    if layout == "transposed" and tensor.ndim == 2:
        return tensor.t().contiguous().t()
    if layout == "view":
        return torch.ones([2, *shape], dtype=dtype)[1]
    return tensor


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 3), max_size=3),
    layout=st.sampled_from(["plain", "expanded", "transposed", "view"]),
    persistent=st.booleans(),
)
def test_every_kind_of_buffer_that_is_saved_can_be_loaded(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    shape: list[int],
    layout: str,
    persistent: bool,
) -> None:
    folder = tmp_path_factory.mktemp("buffers")

    def fit(epochs: int) -> Tensor:
        config = toy_config(folder, epochs=epochs, batch_size=8, tracking=TrackingConfig(progress=False))
        model = Holder(laid_out(dtype, shape, layout), persistent=persistent)
        return Trainer(model, config, toy_data(16)).fit().model.held

    first, second = fit(1), fit(2)
    expected = first if dtype == torch.bool or not first.numel() else first + 2
    assert torch.equal(second, expected)
