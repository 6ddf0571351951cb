"""What a rank works in a step before it has to wait for the others.

With synchronous gradients every rank's step takes the same time, so step times cannot tell which rank
is slow. What can: the time between two collectives, which all ranks leave together. For the last backward
pass of a step, in which gradients are reduced while others are still computed, it is the time until this
rank has its own last gradient; what follows is waiting for the others.
"""

import math
import time
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class _LastGradient:
    """A hook that notes when a gradient was ready; on a GPU in the device's own time."""

    def __init__(self, device: torch.device) -> None:
        self.parameter: Tensor | None = None
        self.at = math.nan
        self.event = _cuda_event(device)

    def __call__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        if self.event is None:
            self.at = time.perf_counter()
        else:
            self.event.record()


class WorkClock:
    """Times this rank's own part of the backward pass that reduces gradients.

    During the first step it watches every gradient, afterwards the one that came last. Where parameters
    are sharded over ranks, every layer has a collective in which ranks wait for each other, so there the
    figure tells less.

    Args:
        parameters: of the model; those that require no gradient are left out.
        device: where they are.
    """

    def __init__(self, parameters: Iterable[Tensor], device: torch.device) -> None:
        self._mark = _LastGradient(device)
        self._began = 0.0
        self._begin_event = _cuda_event(device)
        self._handles = [_hook(p, self._mark) for p in parameters if p.requires_grad]
        self._is_learning = True
        # The hooks know the mark and not this clock, so that it goes, and they with it.
        weakref.finalize(self, _remove, self._handles)

    def start(self) -> None:
        """The backward pass begins, behind a collective."""
        self._mark.parameter = None
        if self._begin_event is None:
            self._began = time.perf_counter()
        else:
            self._begin_event.record()

    def seconds(self) -> float:
        """Time from :meth:`start` until the last gradient was ready; 0.0 where none was seen.

        To be asked once a step, when the device has finished its backward pass.
        """
        last = self._mark.parameter
        if self._is_learning:
            self._is_learning = False
            _remove(self._handles)
            if last is not None:
                self._handles.append(_hook(last, self._mark))
        if last is None:
            return 0.0
        if self._begin_event is None or self._mark.event is None:
            return self._mark.at - self._began
        return float(self._begin_event.elapsed_time(self._mark.event)) / 1000


def _cuda_event(device: torch.device) -> Any:
    """For timing on a GPU; None on a CPU."""
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _hook(parameter: Tensor, mark: _LastGradient) -> RemovableHandle:
    """Call ``mark`` when the gradient of a parameter was added up."""
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(mark)  # type: ignore[no-untyped-call]
    return handle


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
