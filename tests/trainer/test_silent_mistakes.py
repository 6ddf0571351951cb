"""Mistakes that would train or report something else without a word."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import train_with
from support.ranks import run
from support.toy import NoisyData, toy_config, toy_data, toy_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from roadwork_dist import Callback, OptimConfig, TrackingConfig, Trainer
from roadwork_dist.common.errors import ConfigError
from roadwork_dist.metrics.classification import mcc_accuracy
from roadwork_dist.trainer.task import ClassificationTask, TaskOutput


def trainer_of(run_dir: Path, model: nn.Module | None = None, **options: Any) -> Trainer:
    changes = {name: options.pop(name) for name in ("optim", "patience") if name in options}
    config = toy_config(run_dir, epochs=2, tracking=TrackingConfig(progress=False), **changes)
    val = options.pop("val", toy_data(20, seed=2))
    return Trainer(model or toy_model(), config, toy_data(64), val, **options)


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class DetachedOnOneRank(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out.detach() if torch.distributed.get_rank() else out


def refused(run_dir: Path, model: nn.Module) -> str:
    with pytest.raises(ConfigError) as caught:
        trainer_of(run_dir, model).fit()
    return str(caught.value)


@pytest.mark.parametrize(("engine", "ranks"), [("ddp", 1), ("ddp", 2), ("zero2", 2)])
def test_a_loss_without_a_graph_is_refused_on_all_ranks(tmp_path: Path, engine: str, ranks: int) -> None:
    for told in run(train_with, engine, refused, tmp_path, Detached(6, 2), world_size=ranks):
        assert told.startswith("no part of the loss (cross_entropy) depends on a trained weight")
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_loss_without_a_graph_on_one_rank_is_refused_on_all(tmp_path: Path) -> None:
    told = run(train_with, "ddp", refused, tmp_path, DetachedOnOneRank(6, 2), world_size=2)
    assert len(set(told)) == 1


class Margin(nn.Module):
    """A loss with class centres of its own."""

    weights = {"margin": 1.0}  # noqa: RUF012
    figures = ("mcc", "accuracy")

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(2, 2))

    def count(self, batch: Any) -> dict[str, int]:
        return {"margin": len(batch[1])}

    def forward(self, forward: Any, batch: Any) -> TaskOutput:
        logits = F.linear(forward(batch[0]), self.centres)
        loss = F.cross_entropy(logits, batch[1], reduction="sum")
        return TaskOutput({"margin": loss}, {"logits": logits, "label": batch[1]})

    def metrics(self, rows: Any) -> dict[str, float]:
        return mcc_accuracy(rows["label"].numpy(), rows["logits"].numpy())


class HoldsMargin(ClassificationTask):
    def __init__(self) -> None:
        self.losses = [Margin()]


@pytest.mark.parametrize(("task", "name"), [(Margin(), "Margin"), (HoldsMargin(), "HoldsMargin")])
def test_weights_of_a_task_are_refused(tmp_path: Path, task: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} has trainable parameters of its own \(.*centres\)"):
        trainer_of(tmp_path, task=task)


def test_weights_of_a_task_that_are_the_models_are_trained(tmp_path: Path) -> None:
    model, task = toy_model(), Margin()
    model.add_module("margin", nn.Identity())
    model.margin.centres = task.centres  # type: ignore[union-attr]
    before = task.centres.detach().clone()
    trainer_of(tmp_path, model, task=task).fit()
    assert not torch.equal(before, task.centres)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_weights_in_16_bits_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 2)).to(dtype)
    with pytest.raises(
        ConfigError, match=r"2 trained parameters are b?float16 \(1.weight, …\), expected float32"
    ):
        trainer_of(tmp_path, model)
    trainer_of(tmp_path, nn.Sequential(model[0], nn.Linear(6, 2)))  # a frozen part may be


@pytest.mark.parametrize("ranks", [1, 2])
def test_answers_that_are_not_finite_are_counted_and_named(tmp_path: Path, ranks: int) -> None:
    for metrics, bad, told in run(validated_with_nan, tmp_path, world_size=ranks):
        assert bad == [3, 17]
        assert math.isnan(metrics["mcc"])
        assert math.isnan(metrics["accuracy"])
        assert (
            "2 of 20 validation rows have answers that are not finite, so the figures are NaN: 3, 17" in told
        )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["mcc"] for line in lines if line["kind"] == "val"} == {"nan"}


def validated_with_nan(run_dir: Path) -> tuple[dict[str, float], list[int], str]:
    import logging

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("roadwork_dist").addHandler(handler)
    inputs, labels = toy_data(20, seed=2).tensors
    inputs = inputs.clone()
    inputs[[3, 17], 1] = math.nan
    data = TensorDataset(inputs, labels)
    trainer = trainer_of(run_dir, val=data).fit()
    assert trainer.state.best is None
    outcome = trainer.evaluate(data)
    return outcome.metrics, outcome.not_finite, "\n".join(told)


class Figures(ClassificationTask):
    """Has a figure of a reserved name, declared or not."""

    def __init__(self, declared: bool) -> None:
        self.figures = ("mcc", "step") if declared else ("mcc",)  # type: ignore[assignment]

    def metrics(self, rows: Any) -> dict[str, float]:
        return super().metrics(rows) | {"step": 1.0}


@pytest.mark.parametrize("declared", [True, False])
def test_a_figure_that_would_replace_the_step_of_a_line_is_refused(tmp_path: Path, declared: bool) -> None:
    with pytest.raises(ConfigError, match="a figure is called 'step', which every line"):
        trainer_of(tmp_path, task=Figures(declared)).fit()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def test_a_submodule_called_body_is_no_method(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Net(), optim=OptimConfig(layer_decay=0.8)).fit()
    assert trainer.state.epoch == 2


class StopOnOneRank(Callback):
    def on_validation_end(self, run: Any, metrics: Any, improved: bool) -> None:
        run.state.should_stop = run.accelerator.process_index == 1


def epochs_until_stopped(run_dir: Path) -> int:
    return trainer_of(run_dir, callbacks=[StopOnOneRank()]).fit().state.epoch


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_a_stop_on_one_rank_stops_all(tmp_path: Path, engine: str) -> None:
    assert run(train_with, engine, epochs_until_stopped, tmp_path, world_size=2) == [1, 1]


def weights_with_draws(run_dir: Path, batch_size: int, accumulation: int) -> Tensor:
    config = toy_config(
        run_dir,
        epochs=1,
        batch_size=batch_size,
        accumulation=accumulation,
        tracking=TrackingConfig(progress=False),
    )
    trainer = Trainer(toy_model(), config, NoisyData(64)).fit()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_steps_are_the_same_in_other_parts_where_a_data_set_draws(tmp_path: Path) -> None:
    whole = weights_with_draws(tmp_path / "whole", 16, 1)
    in_parts = weights_with_draws(tmp_path / "parts", 4, 4)
    on_two = run(weights_with_draws, tmp_path / "two", 8, 1, world_size=2)[0]
    for other in (in_parts, on_two):
        torch.testing.assert_close(other, whole, rtol=0, atol=1e-6)
