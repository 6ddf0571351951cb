"""Optimizer state other than tensors like their parameter: counters, factors, parameter group entries.

Tensors of a parameter's shape and dtype go into a checkpoint directly. Everything else is described here as
JSON, which refers to tensors of another shape, dtype or device by name and restores them exactly.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from roadwork_dist.common.errors import CheckpointError

Values = dict[str, Any]
"""``parameters``: by parameter name and state key; ``groups``: changed entries of each parameter group."""

_SET_ELSEWHERE = {"params", "lr"}
"""Group entries set by the Trainer: the learning rate is a function of the step."""


def pack(value: Any, name: str, tensors: dict[str, Tensor], device: torch.device) -> Any:
    """A value as JSON; tensors in it are added to ``tensors`` under names that start with ``name``.

    Args:
        value: of an optimizer's state.
        name: of the value.
        tensors: receives the tensors.
        device: of the parameter; a tensor elsewhere (a counter on the CPU) is restored to the CPU.

    Raises:
        CheckpointError: it holds something that is neither JSON nor a tensor.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": name, "dtype": dtype, "with_parameter": value.device == device}
    if isinstance(value, dict):
        return {"dict": [[key, pack(item, f"{name}/{key}", tensors, device)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [pack(item, f"{name}/{number}", tensors, device) for number, item in enumerate(value)]
        return {type(value).__name__: items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"the optimizer keeps a {type(value).__name__} in its state ({name}), expected tensors, numbers, "
        "strings or lists of them: it cannot be resumed exactly, so choose another optimizer"
    )


def unpack(packed: Any, read: Callable[[str, torch.dtype, bool], Tensor]) -> Any:
    """The value that :func:`pack` described.

    Args:
        packed: from JSON.
        read: (name, dtype, whether it was on its parameter's device) -> tensor to fill.
    """
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return read(packed["tensor"], getattr(torch, packed["dtype"]), packed["with_parameter"])
    if "dict" in packed:
        return {key: unpack(item, read) for key, item in packed["dict"]}
    kind, items = next(iter(packed.items()))
    values = [unpack(item, read) for item in items]
    return tuple(values) if kind == "tuple" else values


def is_plain(value: Any, key: str, p: Tensor) -> bool:
    """Whether a stored tensor alone restores a value: one like its parameter, or torch's step counter."""
    if not isinstance(value, Tensor):
        return False
    if key == "step":
        return value.ndim == 0 and value.dtype == torch.float32 and value.device.type == "cpu"
    return value.shape == p.shape and value.dtype == p.dtype and value.device == p.device


def pack_state(state: Mapping[str, Any], name: str, p: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Entries of a parameter's state that are not plain, by key; all its tensors go into ``tensors``."""
    packed = {}
    for key, value in state.items():
        if is_plain(value, key, p):
            tensors[f"{name}/{key}"] = value
        else:
            packed[key] = pack(value, f"{name}/{key}", tensors, p.device)
    return packed


def snapshot(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Entries of the groups, to determine later which have changed."""
    return [dict(_entries(group)) for group in optimizer.param_groups]


def pack_groups(optimizer: Optimizer, before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries of each group that have changed since the start.

    Raises:
        CheckpointError: a group holds something that is neither JSON nor a number.
    """
    packed = []
    for number, (group, old) in enumerate(zip(optimizer.param_groups, before, strict=True)):
        changed = {
            key: value for key, value in _entries(group) if key not in old or not _same(value, old[key])
        }
        packed.append({key: _pack_entry(value, f"group {number}/{key}") for key, value in changed.items()})
    return packed


def load_groups(optimizer: Optimizer, packed: Sequence[Mapping[str, Any]]) -> None:
    """Restore entries from :func:`pack_groups`."""
    for group, entries in zip(optimizer.param_groups, packed, strict=True):
        for key, entry in entries.items():
            group[key] = _unpack_entry(entry)


def _entries(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in group.items() if key not in _SET_ELSEWHERE)


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return isinstance(value, Tensor) and isinstance(other, Tensor) and torch.equal(value, other)
    return bool(value == other)


def _pack_entry(value: Any, name: str) -> Any:
    if isinstance(value, Tensor):  # a few numbers at most; float() of a float32 is exact
        return {"numbers": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    return pack(value, name, {}, torch.device("cpu"))


def _unpack_entry(packed: Any) -> Any:
    if isinstance(packed, dict) and "numbers" in packed:
        return torch.tensor(packed["numbers"], dtype=getattr(torch, packed["dtype"]))

    def no_tensor(name: str, dtype: torch.dtype, with_parameter: bool) -> Tensor:
        raise CheckpointError(f"{name}: a tensor in a list of a parameter group cannot be read back")

    return unpack(packed, no_tensor)
