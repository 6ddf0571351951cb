"""Search for the largest micro-batch, with a model that simulates running out of memory."""

import json
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.ranks import run, spawn
from support.toy import (
    NoisyData,
    Stop,
    StopAt,
    assert_same_tensors,
    lines,
    toy_config,
    toy_data,
    weights,
)
from torch import Tensor, nn

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.random import capture_rng
from roadwork_dist.trainer.callbacks.batch_size import (
    BatchSizeSearch,
    fits,
    largest_that_fits,
    stored_choice,
    untouched,
)
from roadwork_dist.trainer.trainer import Trainer

ROOMY = 1000


class Greedy(nn.Module):
    """Runs out of memory above a number of rows; in the backward pass, like most real models.

    Trials could disturb its batch statistics and dropout.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.limit, self.sizes = limit, []
        norm = nn.BatchNorm1d(16) if limit > 1 else nn.LayerNorm(16)  # a single row has no statistics
        self.layers = nn.Sequential(nn.Linear(6, 16), norm, nn.Dropout(0.2), nn.Linear(16, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.sizes.append(len(inputs))
        hidden = self.layers(inputs)
        if self.training and len(inputs) > self.limit:
            hidden.register_hook(_out_of_memory)
        return hidden


def _out_of_memory(gradient: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def own_limit(limits: tuple[int, ...]) -> int:
    return limits[int(os.environ.get("RANK", "0"))]


def train(folder: Path, limits: tuple[int, ...], stop: int = 0, **changes: Any) -> Any:
    """Sizes of the micro-batches that the model saw, and the weights."""
    settings = {"batch_size": 16, "accumulation": 2, "batch_size_search": "largest"} | changes
    model = Greedy(own_limit(limits))
    callbacks = [StopAt(stop)] if stop else []
    trainer = Trainer(
        model, toy_config(folder, **settings), NoisyData(150), toy_data(20), callbacks=callbacks
    )
    with suppress(Stop):
        trainer.fit()
    return model.sizes, weights(trainer), (trainer.config.batch_size, trainer.config.accumulation)


def test_ranks_agree_on_what_fits_on_all_of_them(tmp_path: Path) -> None:
    # A rank's 32 rows a step come in 8 x 4: the second rank has room for 11 rows only.
    found = run(train, tmp_path / "searched", (ROOMY, 11), world_size=2)
    assert [choice for _, _, choice in found] == [(8, 4), (8, 4)]
    assert json.loads((tmp_path / "searched" / "batch_size.json").read_text()) == {
        "rows": 32,
        "batch_size": 8,
        "accumulation": 4,
    }
    assert "\nbatch_size: 8\n" in (tmp_path / "searched" / "config.yaml").read_text()
    # Trials change nothing: weights, batch statistics, dropout and losses are those of a run that was told.
    told = run(train_as_told, tmp_path / "told", world_size=2)
    for (_, got, _), (_, expected, _) in zip(found, told, strict=True):
        assert_same_tensors(got, expected)
    assert lines(tmp_path / "searched") == lines(tmp_path / "told")


def train_as_told(folder: Path) -> Any:
    return train(folder, (ROOMY, 11), batch_size_search="off", batch_size=8, accumulation=4)


def test_a_resumed_run_takes_its_choice_without_trying(tmp_path: Path) -> None:
    _, whole, _ = train(tmp_path / "whole", (11,))
    train(tmp_path / "killed", (11,), stop=4)
    sizes, got, choice = train(tmp_path / "killed", (ROOMY,))
    assert choice == (8, 4)  # although more fits now: other micro-batches draw other dropout
    assert max(sizes) == 8
    assert_same_tensors(got, whole)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


@pytest.mark.parametrize(("limit", "expected"), [(ROOMY, 24), (24, 24), (23, 12), (7, 6), (1, 1)])
def test_the_largest_divisor_of_a_step_is_found(limit: int, expected: int) -> None:
    assert largest_that_fits(tunable(Greedy(limit)), 24) == expected


def tunable(model: nn.Module, rows: int = 10) -> Any:
    from roadwork_dist.trainer.task import ClassificationTask

    return SimpleNamespace(
        model=model,
        config=toy_config(Path("unused")),
        accelerator=SimpleNamespace(device=torch.device("cpu"), num_processes=1),
        train_data=NoisyData(rows),
        collate=None,
        task=ClassificationTask(),
    )


@pytest.mark.parametrize("limit", [ROOMY, 4])
def test_a_trial_leaves_everything_as_it_was(limit: int) -> None:
    model = Greedy(limit)
    model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = capture_rng()
    assert fits(tunable(model), 16) == (limit == ROOMY)
    assert_same_tensors(dict(model.state_dict()), before)
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model.layers] == [True, False, True, True]
    assert torch.equal(capture_rng()["torch"], random["torch"])
    assert capture_rng()["python"] == random["python"]
    assert torch.equal(capture_rng()["numpy"][0], random["numpy"][0])


def test_other_errors_are_told_and_leave_nothing_behind() -> None:
    model = Greedy(ROOMY)
    statistics = model.layers[1].running_mean.clone()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), untouched(model):
        model(torch.cat([model(torch.randn(4, 6)), torch.randn(4, 2)], dim=1))
    assert torch.equal(model.layers[1].running_mean, statistics)


def test_a_model_that_does_not_fit_at_all_is_refused_on_all_ranks(tmp_path: Path) -> None:
    for exit_ in spawn(train, tmp_path, (1, 0), world_size=2):
        assert "ConfigError" in exit_.error
        assert "not even one row fits into the memory of every rank" in exit_.error
    assert not (tmp_path / "batch_size.json").exists()


def test_a_choice_for_another_share_of_rows_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "batch_size.json").write_text('{"rows": 64, "batch_size": 2, "accumulation": 32}')
    run_ = SimpleNamespace(
        **vars(tunable(Greedy(12))), run_dir=tmp_path, use_micro_batches=lambda size: chosen.append(size)
    )
    run_.accelerator.is_main_process = True
    chosen: list[int] = []
    BatchSizeSearch().on_setup(run_)
    assert chosen == [8]  # of 16 rows


def test_a_choice_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "batch_size.json"
    assert stored_choice(path) is None
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"batch_size\.json is '\{', expected an object with rows"):
        stored_choice(path)
