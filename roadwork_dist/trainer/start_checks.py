"""What is refused before anything is trained, because it would train something else than its user thinks."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.engine.collectives import gather_objects, world_size
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.feed.dataset import MapDataset, check_map_style, rows_digest
from roadwork_dist.trainer.task import Task

RESERVED = frozenset({"kind", "step", "epoch"})
"""Keys of every line of ``metrics.jsonl``: a figure of that name would replace them."""


def check_kinds(**arguments: tuple[object, type, str]) -> None:
    """Refuse arguments of another kind.

    Args:
        arguments: by the argument's name: what was given, what it has to be an instance of, and an example.

    Raises:
        ConfigError: names the argument, what came and what was expected.
    """
    for name, (given, kind, example) in arguments.items():
        if isinstance(given, type) and issubclass(given, kind):
            raise ConfigError(f"{name} is the class {given.__name__}, expected an instance of it: {example}")
        if not isinstance(given, kind):
            raise ConfigError(
                f"{name} is of type {type(given).__name__}, expected {kind.__name__}: {example}"
            )


def check_callbacks(callbacks: object) -> None:
    """Refuse what is no sequence of callbacks.

    Raises:
        ConfigError: says what came.
    """
    if not isinstance(callbacks, Sequence) or isinstance(callbacks, str):
        raise ConfigError(f"callbacks is of type {type(callbacks).__name__}, expected a list of callbacks")
    for number, callback in enumerate(callbacks):
        check_kinds(**{f"callbacks[{number}]": (callback, Callback, "callbacks=[MyCallback()]")})


def check_model(model: nn.Module) -> None:
    """Refuse weights that small steps would not move, or that have no shape yet.

    Raises:
        ConfigError: a trained parameter has 16 bits, where at lr 2e-5 nearly all updates round to nothing; or
            a lazy layer has not seen a batch.
    """
    lazy = [name for name, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ConfigError(
            f"{lazy[0]} has no shape yet (a lazy layer), expected weights: pass a batch through it first"
        )
    small = {torch.bfloat16, torch.float16}
    found = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype in small]
    if found:
        dtype = str(model.get_parameter(found[0]).dtype).removeprefix("torch.")
        raise ConfigError(
            f"{len(found)} trained parameters are {dtype} ({found[0]}, …), expected float32: small updates "
            "round to nothing in 16 bits; call model.float() and set precision='bf16', which computes in 16 "
            "bits and keeps the weights in 32"
        )


def check_data(train_data: object, val_data: MapDataset | None) -> None:
    """Refuse data sets that are not map-style, and an empty validation set.

    Raises:
        ConfigError: says which one, and what came.
    """
    check_map_style(train_data, "train_data")
    if val_data is None:
        return
    check_map_style(val_data, "val_data")
    if len(val_data) == 0:
        raise ConfigError(
            "the validation data set has 0 rows, expected at least 1: give it rows, or None to train "
            "without validation"
        )


def check_ranks(config: TrainConfig, model: nn.Module, data: Mapping[str, Any]) -> None:
    """Refuse settings, models or data that differ between ranks; a collective.

    A seed from the clock, a split without a seed or a time in ``output_dir`` is another one on every rank.

    Raises:
        ConfigError: names what differs, with its values and ranks; on every rank.
    """
    if world_size() == 1:
        return
    own: dict[str, Any] = asdict(config)
    own |= {f"rows of {name}": rows_digest(each) for name, each in data.items() if each is not None}
    parameters = [(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    own["names and shapes of the parameters"] = hashlib.sha256(repr(parameters).encode()).hexdigest()[:12]
    # Before anything else is exchanged: ranks of other shapes would hang or crash in their first collective.
    ranks = gather_objects(own)
    # Of all ranks' names, or a rank that lacks one would go on alone.
    for name in dict.fromkeys(name for each in ranks for name in each):
        values = [each.get(name) for each in ranks]
        if any(value != values[0] for value in values):
            told = ", ".join(f"{value!r} on rank {number}" for number, value in enumerate(values[:4]))
            raise ConfigError(
                f"{name} differs between ranks ({told}), expected the same on all: give random splits and "
                "weights a seed, and take no clock or random number into settings"
            )


def check_task(task: Task, model: nn.Module, monitor: str | None) -> None:
    """Refuse a task whose own weights nobody would train, and figures that cannot be kept.

    Args:
        task: loss and figures.
        model: what is trained.
        monitor: figure that chooses the best weights; None = there is no validation.

    Raises:
        ConfigError: it has trainable parameters that the model lacks, a figure has a reserved name, or
            ``monitor`` is no figure.
    """
    missing = [
        name for name in ("weights", "figures", "count", "metrics", "__call__") if not hasattr(task, name)
    ]
    if missing or isinstance(task, type):
        what = f"the class {task.__name__}" if isinstance(task, type) else f"of type {type(task).__name__}"
        raise ConfigError(
            f"task is {what}, expected an object with weights, figures, count(batch), metrics(rows) and "
            "__call__(forward, batch), such as ClassificationTask(): see roadwork_dist.trainer.task.Task"
        )
    own = {id(p) for p in model.parameters()}
    foreign = [name for name, p in _parameters_of(task) if p.requires_grad and id(p) not in own]
    if foreign:
        raise ConfigError(
            f"{type(task).__name__} has trainable parameters of its own ({', '.join(foreign[:3])}), which "
            "would be neither trained nor saved: make them part of the model, in a sub-module that the task "
            "calls, or set requires_grad to False"
        )
    figures = ("loss", *task.figures)
    check_figures(figures)
    if monitor is not None and monitor.removeprefix("-") not in figures:
        raise ConfigError(
            f"monitor is {monitor!r}, but this task's figures are {', '.join(figures)} "
            "(with a leading '-' where lower is better)"
        )


def check_figures(names: Iterable[str]) -> None:
    """Refuse names of figures that mean something else in ``metrics.jsonl``.

    Raises:
        ConfigError: names them.
    """
    taken = sorted(RESERVED & set(names))
    if taken:
        raise ConfigError(
            f"a figure is called {taken[0]!r}, which every line of metrics.jsonl has already: rename it"
        )


def _parameters_of(task: object) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a task that is a module, or that holds modules and parameters as attributes."""
    if isinstance(task, nn.Module):
        yield from task.named_parameters()
        return
    for name, value in getattr(task, "__dict__", {}).items():
        for inner in (
            value.values()
            if isinstance(value, Mapping)
            else value
            if isinstance(value, list | tuple)
            else [value]
        ):
            if isinstance(inner, nn.Parameter):
                yield name, inner
            elif isinstance(inner, nn.Module):
                yield from ((f"{name}.{below}", p) for below, p in inner.named_parameters())
