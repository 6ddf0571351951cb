"""Optimizers by name, and what a step makes of their groups."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from support.toy import toy_config, toy_data, toy_model
from torch import nn

from roadwork_dist import Callback, Trainer
from roadwork_dist.common.errors import ConfigError
from roadwork_dist.trainer.config import OptimConfig, TrainConfig
from roadwork_dist.trainer.engine.build import build_engine
from roadwork_dist.trainer.optim.optimizers import OPTIMIZERS, build_optimizer
from roadwork_dist.trainer.step import LoadedBatch, OptimizerStep
from roadwork_dist.trainer.task import ClassificationTask


def test_adamw_takes_every_setting() -> None:
    config = OptimConfig(lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
    optimizer = build_optimizer(toy_model(), config)
    assert type(optimizer) is torch.optim.AdamW
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.95), 1e-6)
        assert group["weight_decay"] == decay


def test_decay_moves_a_matrix_without_gradient_and_no_vector() -> None:
    model = nn.Linear(3, 3)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, before["bias"])


def test_names() -> None:
    assert "adamw" in OPTIMIZERS
    with pytest.raises(ConfigError, match="unknown optimizer 'adam': did you mean 'adamw'"):
        build_optimizer(toy_model(), OptimConfig(name="adam"))
    with pytest.raises(ConfigError, match="Linear has no parameter that requires a gradient"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimConfig())


def one_step(
    optimizer_of: type[torch.optim.Optimizer], clip: float, scales: tuple[float, float]
) -> nn.Module:
    model = toy_model()
    groups = [{"params": [p], "lr_scale": scales[p.ndim == 1]} for p in model.parameters()]
    optimizer = optimizer_of(groups, lr=1.0)
    config = TrainConfig(device="cpu", optim=OptimConfig(clip=clip))
    step = OptimizerStep(build_engine(Accelerator(cpu=True), model, optimizer, config), ClassificationTask())
    inputs, labels = toy_data(8).tensors
    step([LoadedBatch((inputs, labels), list(range(8)), False)], 0.1)
    return model


def test_a_step_honours_the_lr_scale_of_a_group() -> None:
    start = toy_model()
    moved = [
        [
            float((p - q).detach().abs().max())
            for p, q in zip(model.parameters(), start.parameters(), strict=True)
        ]
        for model in (one_step(torch.optim.SGD, 0.0, (1.0, 1.0)), one_step(torch.optim.SGD, 0.0, (0.5, 0.0)))
    ]
    for parameter, whole, scaled in zip(start.parameters(), *moved, strict=True):
        assert whole > 0
        assert scaled == (0.0 if parameter.ndim == 1 else pytest.approx(whole / 2, rel=1e-4))


@pytest.mark.parametrize("clip", [1e-3, 0.2, 0.5, 100.0, 0.0])
def test_clipping_is_torchs_own_to_the_bit(clip: float) -> None:
    model = toy_model()
    inputs, labels = toy_data(8).tensors
    nn.functional.cross_entropy(model(inputs), labels).backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for got, expected in zip(
        one_step(torch.optim.SGD, clip, (1.0, 1.0)).parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(got, expected)


def test_a_group_keeps_its_own_rate_through_the_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OPTIMIZERS, "_items", dict(OPTIMIZERS._items))

    @OPTIMIZERS.register("two rates")
    def two_rates(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
        first, *others = model.parameters()
        return torch.optim.SGD(
            [{"params": [first], "lr": 1e-5}, {"params": others, "lr_scale": 0.5}], lr=config.lr
        )

    class Rates(Callback):
        seen: ClassVar[list[tuple[float, ...]]] = []

        def on_step_end(self, run: Any, result: Any) -> None:
            self.seen.append((result.lr, *(group["lr"] for group in run.optimizer.param_groups)))

    config = toy_config(tmp_path, epochs=1, optim=OptimConfig(name="two rates", lr=0.01))
    Trainer(toy_model(), config, toy_data(96), callbacks=[Rates()]).fit()
    assert len({lr for lr, *_ in Rates.seen}) > 3  # a cosine
    for lr, first, others in Rates.seen:
        assert first == pytest.approx(1e-3 * lr)
        assert others == pytest.approx(0.5 * lr)


def test_muon_steps_matrices_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Linear(4, 4))
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    own = build_optimizer(model, OptimConfig(name="muon", lr=0.1, weight_decay=0.2))
    by_hand = [
        torch.optim.Muon([expected["1.weight"]], lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([expected["0.weight"]], lr=0.1, weight_decay=0.2),
        torch.optim.AdamW([expected["0.bias"], expected["1.bias"]], lr=0.1, weight_decay=0.0),
    ]
    for _ in range(3):
        for name, p in model.named_parameters():
            p.grad, expected[name].grad = gradients[name].clone(), gradients[name].clone()
        for optimizer in (own, *by_hand):
            optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name]), name
    own.load_state_dict(own.state_dict())
    own.param_groups[0]["lr"] = 0.0
    before = model[1].weight.detach().clone()
    own.step()
    assert torch.equal(before, model[1].weight)  # the parts still see the groups


@pytest.mark.parametrize("need", ["train and eval modes", "a second backward pass"])
def test_what_no_engine_provides_is_refused_at_the_start(
    need: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OPTIMIZERS, "_items", dict(OPTIMIZERS._items))
    OPTIMIZERS.register("demanding", needs=frozenset({need}))(OPTIMIZERS["adamw"].build)
    config = toy_config(tmp_path, optim=OptimConfig(name="demanding"))
    with pytest.raises(
        ConfigError, match=f"'demanding', which needs {need}, and the engine replicated does not"
    ):
        Trainer(toy_model(), config, toy_data(16))
