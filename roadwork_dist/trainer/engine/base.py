"""Interface to a model that is distributed over processes, for training steps, averages and checkpoints.

An engine owns the working copy of a model: replicated (one process, or data parallel), sharded by
FSDP2, or partitioned by DeepSpeed ZeRO. Callers do not depend on which.

Three forms of a tensor that belongs to a trained parameter (the parameter itself, a moment of the
optimizer, its average):

- *local*: the part this process holds, in fp32, sharing memory with the tensor in use;
- *stored*: what this process writes to a checkpoint: whole tensors, or DTensors, which carry their position.
  Names and shapes are those of the bare model, so any engine can load them;
- *whole*: the full tensor on the CPU of the main process, for export.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.engine.optimizer_values import Values, snapshot


class TensorSource(Protocol):
    """Named tensors of a checkpoint."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shape of every available tensor, the same on all ranks."""

    def read(self, into: dict[str, Tensor]) -> None:
        """Fill tensors in place by name, resharding as needed. All ranks call it together."""


class Engine(ABC):
    """A model distributed over processes.

    Args:
        accelerator: processes and device.
        model: the bare module; it remains the same object, though its parameters may become shards.
        optimizer: over the model's trainable parameters.
        config: precision and clipping; ``bf16`` autocasts forward passes, weights stay in fp32.

    Attributes:
        forward: the forward pass of training.
        evaluate: the forward pass of a model in eval mode.
        lockstep: a forward pass contains collectives, so all ranks must run equally many.
        offers: what this engine provides to optimizers beyond element-wise updates.
    """

    name: ClassVar[str]
    lockstep: ClassVar[bool] = False
    offers: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, config: TrainConfig
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.config = accelerator, model, optimizer, config
        self.device: torch.device = accelerator.device
        self.processes: int = accelerator.num_processes
        self.max_norm = config.optim.clip or math.inf
        self.forward: Callable[..., Any] = model
        self.evaluate: Callable[..., Any] = model
        self._groups_at_start = snapshot(optimizer)

    def accumulate(self) -> AbstractContextManager[Any]:
        """Context of forward and backward passes whose gradients are accumulated but not yet reduced."""
        return nullcontext()

    @abstractmethod
    def backward(self, roots: Sequence[Tensor], factors: Tensor, *, is_last: bool) -> None:
        """Add the gradients of ``sum(factors * roots)``; the last call of a step averages them over ranks."""

    @abstractmethod
    def forget_gradients(self) -> None:
        """Discard the gradients of a step that is not taken."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """Clip, step unless a gradient is not finite, and discard the gradients.

        Args:
            lr: learning rate; a parameter group scales it by its ``lr_scale``.

        Returns:
            The gradients' global L2 norm before clipping, the same on all ranks; not finite = no step taken.
        """

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Local tensors of the trained parameters, by name; a rank may hold nothing of some of them."""

    def weights_changed(self) -> None:  # noqa: B027  (most engines keep no second copy)
        """Update the engine's other copies after local weights were written; all ranks call it together."""

    @abstractmethod
    def stored(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored form of local tensors laid out like :meth:`weights`; all ranks call it together."""

    @abstractmethod
    def fill(self, local: Mapping[str, Tensor], source: TensorSource, prefix: str) -> None:
        """Read local tensors laid out like :meth:`weights` from their stored form, in place.

        All ranks call it together.

        Args:
            local: tensors to overwrite, by name of the parameter.
            source: holds them as ``prefix + name``.
            prefix: of their names.
        """

    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """Stored form of the optimizer's state as ``name/moment``; all ranks call it together."""

    @abstractmethod
    def optimizer_values(self) -> Values:
        """The optimizer's state that :meth:`moments` does not cover, as JSON; all ranks call it together."""

    @abstractmethod
    def load_moments(self, source: TensorSource, prefix: str, values: Values | None) -> None:
        """Load :meth:`moments`, stored as ``prefix + name/moment``, and :meth:`optimizer_values`.

        All ranks call it together; ``values`` is None if the checkpoint was written by version 0.1.
        """

    def whole_state(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Whole tensors of the bare model's state dict, on the CPU of the main process.

        All ranks call it together; tensors are gathered one at a time.

        Args:
            names: which ones; None = all.

        Returns:
            Copies by name; an empty mapping on the other ranks.
        """
        whole = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and (names is None or name in names):  # not a module's extra state
                with self._gathered(tensor) as full:
                    if self.accelerator.is_main_process:
                        whole[name] = full.detach().to("cpu", copy=True).contiguous()
        return whole

    def held(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the model that this process holds."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()

    @torch.no_grad()
    def put_whole(self, tensor: Tensor, whole: Tensor) -> None:
        """Overwrite a parameter that does not learn; all ranks call it together with the same values."""
        if isinstance(tensor, DTensor):
            # Every rank has the whole tensor, so each takes its own part and none has to send.
            placed = whole.to(tensor.device)
            whole = distribute_tensor(placed, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(whole)

    def _gathered(self, tensor: Tensor) -> AbstractContextManager[Tensor]:
        """Context in which a tensor of the model is whole, at least on the main process."""
        return nullcontext(tensor)


def lay_out_contiguously(model: nn.Module) -> None:
    """Make every weight row-major, since sharding does not support ``channels_last``."""
    for p in model.parameters():
        # contiguous() would not change a 1x1 convolution: it ignores the strides of axes of length 1.
        if p.stride() != torch.empty(p.shape, device="meta").stride():
            p.data = p.data.clone(memory_format=torch.contiguous_format)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def moment_names(source: TensorSource, prefix: str, name: str) -> list[str]:
    """Names of the moments that a checkpoint holds for a parameter."""
    start = f"{prefix}{name}/"
    return [key.removeprefix(start) for key in source.shapes if key.startswith(start)]


@dataclass(frozen=True)
class PrefixedSource:
    """The tensors of a source whose names start with a prefix, by the names without it."""

    prefix: str
    source: TensorSource

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes, by name without the prefix."""
        return {
            name.removeprefix(self.prefix): shape
            for name, shape in self.source.shapes.items()
            if name.startswith(self.prefix)
        }

    def read(self, into: dict[str, Tensor]) -> None:
        """Fill tensors in place."""
        self.source.read({self.prefix + name: tensor for name, tensor in into.items()})


@dataclass(frozen=True)
class WholeTensors:
    """A source of tensors in memory, the same on all ranks."""

    tensors: Mapping[str, Tensor]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def read(self, into: dict[str, Tensor]) -> None:
        """Fill tensors in place.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        for name, target in into.items():
            if name not in self.tensors or self.tensors[name].shape != target.shape:
                got = f"has shape {tuple(self.tensors[name].shape)}" if name in self.tensors else "is missing"
                raise CheckpointError(
                    f"the weights do not fit the model: {name} {got}, expected shape {tuple(target.shape)}"
                )
            whole = self.tensors[name]
            if isinstance(target, DTensor):
                # Every rank has the whole tensor, so each takes its own part without communication.
                whole = distribute_tensor(
                    whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None
                )
            target.copy_(whole)
