"""The moving average against its formula."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch_ema
from support.toy import toy_config, toy_data, toy_model
from torch import nn

from roadwork_dist.trainer.callbacks.averaging import EmaCallback
from roadwork_dist.trainer.config import EmaConfig
from roadwork_dist.trainer.engine.base import trained_parameters
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.events.state import StepResult
from roadwork_dist.trainer.optim.ema import ExponentialMovingAverage
from roadwork_dist.trainer.trainer import Trainer


def shadow_of(average: ExponentialMovingAverage) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in average.shadow().items()}


def disturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.mark.parametrize("warmup", [True, False])
def test_the_formula_in_float64(warmup: bool) -> None:
    model = toy_model()
    average = ExponentialMovingAverage(trained_parameters(model), EmaConfig(decay=0.9, warmup=warmup))
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    for update in range(100):
        disturb(model, update)
        decay = min(0.9, (1 + update) / (10 + update)) if warmup else 0.9
        for name, parameter in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
        average.update()
    for name, tensor in shadow_of(average).items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_the_decay_warms_up() -> None:
    average = ExponentialMovingAverage(trained_parameters(toy_model()), EmaConfig(decay=0.9999))
    assert [average.decay_at(n) for n in (0, 1, 90)] == [0.1, 2 / 11, 0.91]
    assert average.decay_at(89_989) < 0.9999 == average.decay_at(89_991) == average.decay_at(10**7)
    assert (
        ExponentialMovingAverage(
            trained_parameters(toy_model()), EmaConfig(decay=0.5, warmup=False)
        ).decay_at(0)
        == 0.5
    )


def test_bf16_weights_have_an_fp32_shadow_that_still_moves_at_09999() -> None:
    model = nn.Linear(4, 4).to(torch.bfloat16)
    average = ExponentialMovingAverage(trained_parameters(model), EmaConfig(decay=0.9999, warmup=False))
    before = shadow_of(average)
    disturb(model, 0)
    for _ in range(10):
        average.update()
    for name, parameter in model.named_parameters():
        shadow = shadow_of(average)[name]
        assert shadow.dtype == torch.float32
        # In bf16 (8 bits) a ten-thousandth of the way would be rounded away.
        expected = before[name] + (parameter.detach().float() - before[name]) * (1 - 0.9999**10)
        torch.testing.assert_close(shadow, expected, rtol=0, atol=1e-6)
        assert not torch.equal(shadow, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_restores_weights_and_average_to_the_bit(dtype: torch.dtype) -> None:
    model = toy_model().to(dtype)
    average = ExponentialMovingAverage(trained_parameters(model), EmaConfig(decay=0.9))
    disturb(model, 1)
    average.update()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    shadow = shadow_of(average)
    with average.average_parameters():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, shadow[name].to(dtype))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(shadow_of(average)[name], shadow[name])


def test_swapping_restores_after_an_error() -> None:
    model = toy_model()
    average = ExponentialMovingAverage(trained_parameters(model), EmaConfig())
    disturb(model, 1)
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), average.average_parameters():
        raise ZeroDivisionError
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_a_shadow_is_written_in_place_and_goes_on() -> None:
    first, second = toy_model(), toy_model()
    average = ExponentialMovingAverage(trained_parameters(first), EmaConfig(decay=0.99))
    for update in range(3):
        disturb(first, update)
        average.update()
    other = ExponentialMovingAverage(trained_parameters(second), EmaConfig(decay=0.99))
    for name, tensor in other.shadow().items():
        tensor.copy_(average.shadow()[name])
    other.num_updates = average.num_updates
    second.load_state_dict(first.state_dict())
    for model, one in ((first, average), (second, other)):
        disturb(model, 9)
        one.update()
    for name, tensor in average.shadow().items():
        assert torch.equal(tensor, other.shadow()[name])


def test_a_restart_forgets_the_past() -> None:
    model = toy_model()
    average = ExponentialMovingAverage(trained_parameters(model), EmaConfig(decay=0.99))
    disturb(model, 1)
    average.update()
    average.restart()
    assert average.num_updates == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(average.shadow()[name], parameter)


def test_frozen_parameters_have_no_shadow() -> None:
    model = toy_model()
    model[0].requires_grad_(False)
    assert "0.weight" not in ExponentialMovingAverage(trained_parameters(model), EmaConfig()).shadow()


class Watch(Callback):
    """What the average and the weights were when validation ran."""

    def __init__(self) -> None:
        self.skipped: list[bool] = []

    def on_step_end(self, run: Any, result: StepResult) -> None:
        self.skipped.append(result.skipped)

    def on_validation_end(self, run: Any, metrics: dict[str, float], improved: bool) -> None:
        self.validated = [p.detach().clone() for p in run.model.parameters()]


def test_training_updates_once_a_step_not_for_skipped_ones_and_validates_with_it(tmp_path: Path) -> None:
    data = toy_data(64)
    data.tensors[0][5] = float("nan")
    watch = Watch()
    trainer = Trainer(toy_model(), toy_config(tmp_path, epochs=1), data, toy_data(8), callbacks=[watch]).fit()
    (callback,) = (c for c in trainer.callbacks if isinstance(c, EmaCallback))
    assert callback.average is not None
    assert watch.skipped.count(True) == 1
    assert callback.average.num_updates == watch.skipped.count(False) == 3
    for validated, shadow, parameter in zip(
        watch.validated, shadow_of(callback.average).values(), trainer.model.parameters(), strict=True
    ):
        assert torch.equal(validated, shadow)
        assert not torch.equal(validated, parameter)


def test_complex_weights_are_averaged_in_both_parts() -> None:
    weight = nn.Parameter(torch.tensor([1.0 + 2.0j, 3.0 - 1.0j], dtype=torch.complex64))
    average = ExponentialMovingAverage({"w": weight}, EmaConfig(decay=0.75, warmup=False))
    with torch.no_grad():
        weight.mul_(3j)
    average.update()
    expected = torch.tensor([0.75 * (1 + 2j) + 0.25 * 3j * (1 + 2j), 0.75 * (3 - 1j) + 0.25 * 3j * (3 - 1j)])
    torch.testing.assert_close(average.shadow()["w"], expected)
    with average.average_parameters():
        torch.testing.assert_close(weight.detach(), expected)


def test_it_is_torch_emas_average_with_its_methods() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    average = ExponentialMovingAverage({"w": weight}, EmaConfig(decay=0.9999, warmup=False))
    assert isinstance(average, torch_ema.ExponentialMovingAverage)
    with torch.no_grad():
        weight += 1
    for _ in range(10):
        average.update()
    moved = 1 + (1 - 0.9999**10)  # a shadow in bf16, as torch_ema's own, would stay at 1
    torch.testing.assert_close(average.shadow()["w"][0], torch.tensor(moved), rtol=0, atol=1e-6)
    average.store()
    average.copy_to()
    assert weight.tolist() == [1.0, 2.0]  # rounded to bf16
    average.restore()
    assert weight.tolist() == [2.0, 3.0]
    other = ExponentialMovingAverage({"w": weight}, EmaConfig(decay=0.5))
    memory = other.shadow()["w"]
    other.load_state_dict(average.state_dict())
    assert other.num_updates == 10
    assert other.shadow()["w"] is memory
    assert torch.equal(memory, average.shadow()["w"])  # fp32 all the way
    other.update([weight])  # weights that are given, as torch_ema takes them
    assert other.num_updates == 11
    with pytest.raises(ValueError, match="Number of parameters"):
        other.update([])
