"""What a stranger reads who brings a model, data or arguments of another kind: one line that helps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.toy import toy_config, toy_data, toy_model
from torch import Tensor, nn

from roadwork_dist import Callback, TrackingConfig, TrainConfig, Trainer
from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.trainer.task import ClassificationTask


class Rows:
    """Rows made by a function of their number."""

    def __init__(self, row: Any) -> None:
        self.row = row

    def __len__(self) -> int:
        return 32

    def __getitem__(self, number: int) -> Any:
        return self.row(number)


class Returns(nn.Module):
    """Turns the logits into something else."""

    def __init__(self, change: Any, classes: int = 2) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(6, classes), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.linear(x))


X = torch.ones(6)

ARGUMENTS = {
    "model is a class": ({"model": nn.Linear}, "model is the class Linear, expected an instance"),
    "model is a function": ({"model": lambda x: x}, "model is of type function, expected Module"),
    "config is a dict": ({"config": {"epochs": 1}}, "config is of type dict, expected TrainConfig"),
    "config is the class": ({"config": TrainConfig}, "config is the class TrainConfig, expected an instance"),
    "callback is a class": (
        {"callbacks": [Callback]},
        "callbacks[0] is the class Callback, expected an instance",
    ),
    "callback is a function": ({"callbacks": [print]}, "callbacks[0] is of type builtin_function_or_method"),
    "callbacks is one": ({"callbacks": Callback()}, "callbacks is of type Callback, expected a list"),
    "task is a word": (
        {"task": "classification"},
        "task is of type str, expected an object with weights, figures",
    ),
    "task is a class": (
        {"task": ClassificationTask},
        "task is the class ClassificationTask, expected an object",
    ),
    "val is a dict": (
        {"val": {"a": toy_data(8), "b": toy_data(8)}},
        "val_data is a dict of a, b, expected one data set",
    ),
    "lazy layer": ({"model": nn.LazyLinear(2)}, "weight has no shape yet (a lazy layer)"),
}

BATCHES = {
    "dict": (
        {"data": Rows(lambda n: {"x": X, "y": 0})},
        "a batch is a dict with the keys x, y, expected (inputs, labels)",
    ),
    "inputs alone": ({"data": Rows(lambda n: X)}, "a batch is a Tensor, expected (inputs, labels)"),
    "three": ({"data": Rows(lambda n: (X, 0, n))}, "a batch is a list of 3, expected (inputs, labels)"),
    "no label": ({"data": Rows(lambda n: (X, None))}, "cannot be put into one batch (TypeError"),
    "ragged": (
        {"data": Rows(lambda n: (torch.ones(n + 1), 0))},
        "cannot be put into one batch (RuntimeError",
    ),
    "float labels": ({"data": Rows(lambda n: (X, 0.5))}, "labels are float64 [16], expected int64 [batch]"),
    "word labels": ({"data": Rows(lambda n: (X, "cat"))}, "labels are a tuple, expected int64 [batch]"),
    "one-hot labels": (
        {"data": Rows(lambda n: (X, torch.ones(2)))},
        "labels are float32 [16, 2], expected int64",
    ),
    "negative label": (
        {"data": Rows(lambda n: (X, -1))},
        "a label is -1, expected the number of a class, from 0",
    ),
    "label too large": (
        {"data": Rows(lambda n: (X, 2))},
        "a label is 2, but the model tells 2 classes, 0 to 1",
    ),
    "tuple": (
        {"model": Returns(lambda z: (z, z))},
        "the model returned a tuple for 16 rows, expected logits [16, classes]",
    ),
    "dict out": ({"model": Returns(lambda z: {"logits": z})}, "the model returned a dict for 16 rows"),
    "nothing": ({"model": Returns(lambda z: None)}, "the model returned a NoneType for 16 rows"),
    "one number": ({"model": Returns(lambda z: z[:, 0])}, "the model returned a tensor [16] for 16 rows"),
    "one logit": (
        {"model": Returns(lambda z: z, classes=1), "data": Rows(lambda n: (X, 0))},
        "a tensor [16, 1] for 16 rows, expected logits [16, classes] of two classes or more",
    ),
}


def start(folder: Path, **given: Any) -> Trainer:
    config = toy_config(folder, epochs=1, tracking=TrackingConfig(progress=False))
    return Trainer(
        given.pop("model", None) or toy_model(),
        given.pop("config", config),
        given.pop("data", toy_data(32)),
        given.pop("val", toy_data(16, seed=2)),
        **given,
    )


@pytest.mark.parametrize(("given", "told"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_of_another_kind_are_refused_in_one_line(tmp_path: Path, given: Any, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        start(tmp_path, **given)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "told"), BATCHES.values(), ids=BATCHES)
def test_batches_and_outputs_of_another_kind_are_told_in_one_line(
    tmp_path: Path, given: Any, told: str
) -> None:
    with pytest.raises(DataError) as caught:
        start(tmp_path, **given).fit()
    assert told in str(caught.value)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_an_error_of_a_data_set_stays_and_names_the_rows(tmp_path: Path) -> None:
    def broken(number: int) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        start(tmp_path, data=Rows(broken)).fit()
    assert any(note.endswith("of a Rows") for note in caught.value.__notes__)
