"""Collective operations between ranks; with one process each returns its input.

All ranks must call these functions in the same order, or all hang.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from roadwork_dist.common.errors import RoadworkError

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sum of ``values`` over all ranks, in float64."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def rank() -> int:
    """Number of this process among those that train together, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def host_group() -> dist.ProcessGroup | None:
    """A second process group of all ranks, through host memory, for another thread to use independently.

    None with one process. All ranks call it together.
    """
    return dist.new_group(backend="gloo") if world_size() > 1 else None  # type: ignore[return-value]


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """``value`` of every rank, in rank order (pickled: for small objects)."""
    if world_size() == 1:
        return [value]
    gathered: list[T] = [value] * world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_results(work: Callable[[], T]) -> list[T]:
    """Do a share of work on every rank; returns the results of all, in rank order.

    Raises:
        OSError, RoadworkError: on all ranks if any failed: the rank's own error, else that of the first
            rank that failed.
    """
    result, error = None, None
    try:
        result = work()
    except (OSError, RoadworkError) as caught:
        error = caught
    # A rank that failed gets here too, so the others do not wait for it in vain.
    shares = gather_objects((result, error))
    for _, failed in shares:
        if failed is not None:
            raise error or failed
    return [result for result, _ in shares]  # type: ignore[misc]


def broadcast_object(value: T, source: int = 0) -> T:
    """``value`` of rank ``source`` on every rank (pickled: for small objects)."""
    if world_size() == 1:
        return value
    box: list[T] = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def broadcast_tensors(tensors: Iterable[Tensor], source: int = 0) -> None:
    """Overwrite tensors, in place, with those of rank ``source``."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, source)


def gather_rows(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate each tensor over ranks along its first axis; ranks may hold different numbers of rows.

    Returns:
        Tensors on the CPU, rank 0's rows first. A rank without rows passes tensors of length 0,
        or an empty mapping.
    """
    local = {name: tensor.detach().cpu() for name, tensor in rows.items()}
    shards = [shard for shard in gather_objects(local) if shard]
    if not shards:
        return {}
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
