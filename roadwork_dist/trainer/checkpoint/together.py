"""Runs an action on all ranks: all succeed, or all raise the same error."""

import socket
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from roadwork_dist.common.errors import CheckpointError, RoadworkError
from roadwork_dist.trainer.engine.collectives import gather_objects, rank, world_size

T = TypeVar("T")


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Run an action on every rank. A collective: all ranks call it together.

    Args:
        action: this rank's part. May use collectives only if they fail on all ranks or none.
        group: for the ranks' communication.

    Returns:
        What every rank's action returned, by rank.

    Raises:
        CheckpointError: on all ranks, if one of them had a system or user error; says what and, if there
            are several ranks, on which.
        Exception: a program error: unchanged on its rank, as a RuntimeError on the others.
    """
    value, error = None, None
    try:
        value = action()
    except Exception as caught:
        error = caught
    is_fault = error is not None and not isinstance(error, (OSError, RoadworkError))
    outcomes = gather_objects((value, "" if error is None else reason(error), is_fault), group)
    if is_fault and error is not None:
        raise error
    for _, failure, fault in outcomes:
        if fault:
            raise RuntimeError(failure)
    for _, failure, _ in outcomes:
        if failure:
            raise CheckpointError(failure) from error
    return [value for value, _, _ in outcomes]  # type: ignore[misc]


def on_main(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run an action on rank 0 and return its result on all ranks; raises like :func:`together`."""
    return together(lambda: action() if rank() == 0 else None, group)[0]  # type: ignore[return-value]


def reason(error: BaseException) -> str:
    """What went wrong, with the rank and its host if there are several ranks."""
    if isinstance(error, RoadworkError):
        return str(error)  # says already what went wrong
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if not isinstance(error, OSError):
        text = f"{type(error).__name__}: {text}"
    return text if world_size() == 1 else f"rank {rank()} on {socket.gethostname()}: {text}"
