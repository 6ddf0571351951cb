"""Modes, buffers and random states of a model before and after what must not change them."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.engines import train_with
from support.ranks import run
from support.toy import assert_same_tensors, toy_config, toy_data
from torch import Tensor, nn

from roadwork_dist import Callback, EmaConfig, TrackingConfig, Trainer
from roadwork_dist.common.undisturbed import undisturbed


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))


def trainer_of(run_dir: Path, model: nn.Module, *callbacks: Callback, val: bool = False) -> Trainer:
    config = toy_config(
        run_dir, epochs=2, ema=EmaConfig(enabled=False), tracking=TrackingConfig(progress=False)
    )
    held_out = toy_data(20, seed=2) if val else None
    return Trainer(model, config, toy_data(64), held_out, callbacks=callbacks)


class EveryTwoSteps(Callback):
    """Evaluates in the middle of an epoch."""

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step % 2 == 0:
            run.evaluate(toy_data(20, seed=2))
            assert run.model.training


def trained(run_dir: Path, evaluates: bool) -> dict[str, Tensor]:
    trainer = trainer_of(run_dir, net(), *([EveryTwoSteps()] if evaluates else []), val=True).fit()
    return trainer.engine.whole_state()


@pytest.mark.parametrize(("engine", "ranks"), [("ddp", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2)])
def test_evaluating_in_an_epoch_changes_nothing(tmp_path: Path, engine: str, ranks: int) -> None:
    plain, evaluating = (
        run(train_with, engine, trained, tmp_path / str(evaluates), evaluates, world_size=ranks)[0]
        for evaluates in (False, True)
    )
    assert_same_tensors(plain, evaluating)


def test_parts_that_were_given_in_eval_mode_stay_in_it(tmp_path: Path) -> None:
    trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).requires_grad_(False).eval()
    model = nn.Sequential(trunk, nn.Linear(8, 2))
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    trainer_of(tmp_path, model, val=True).fit()
    assert_same_tensors(dict(trunk.state_dict()), before)
    assert [module.training for module in (model, trunk, trunk[1], trunk[2], model[1])] == [
        *(True, False, False, False, True)
    ]


def test_a_part_that_is_unfrozen_later_stays_in_train_mode(tmp_path: Path) -> None:
    trunk = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    model = nn.Sequential(trunk, nn.Linear(6, 2))

    class Unfreeze(Callback):
        def on_epoch_end(self, run: Any) -> None:
            trunk.train()

    trainer_of(tmp_path, model, Unfreeze(), val=True).fit()
    assert int(trunk[1].num_batches_tracked) == 4  # of the second epoch only


def test_a_model_in_eval_mode_is_put_into_train_mode(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = net().eval()
    trainer_of(tmp_path, model).fit()
    assert int(model[1].num_batches_tracked) == 8  # type: ignore[index]
    assert "Sequential was given in eval mode: all of it is put into train mode" in caplog.text


class Replacing(nn.Module):
    """Replaces one buffer and repeats the memory of another, as models do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("mean", torch.zeros(1, 1).expand(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return x + self.mean


def test_a_block_leaves_no_trace_even_after_an_error() -> None:
    model = nn.Sequential(net(), Replacing(), nn.Dropout().eval())
    modes = [module.training for module in model.modules()]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)

    def disturb() -> None:
        with undisturbed(model):
            model.eval()
            model.train()
            model[0](torch.randn(8, 6))
            model[1](torch.randn(8, 6))
            random.random()
            np.random.rand()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        disturb()
    assert [module.training for module in model.modules()] == modes
    assert_same_tensors(dict(model.named_buffers()), before)
    drawn = torch.rand(()), random.random(), np.random.rand()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert drawn == (torch.rand(()), random.random(), np.random.rand())
