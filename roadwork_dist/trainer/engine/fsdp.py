"""Parameters, gradients and moments sharded over ranks by torch's FSDP2 (``fully_shard``)."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.engine.base import TensorSource, lay_out_contiguously
from roadwork_dist.trainer.engine.blocks import repeated_classes
from roadwork_dist.trainer.engine.collectives import broadcast_tensors
from roadwork_dist.trainer.engine.native import NativeEngine
from roadwork_dist.trainer.engine.precision import in_precision


class Fsdp2(NativeEngine):
    """FSDP2 as Accelerate applies it: one unit per repeated block, one for the rest.

    Weights are gathered and gradients reduced in fp32, so a step equals that of data parallel training;
    bf16 is applied by autocast.
    """

    name = "fsdp2"
    lockstep = True
    offers = frozenset({"whole matrices"})  # DTensors compute norms and products of the whole matrix

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, config: TrainConfig
    ) -> None:
        # fully_shard keeps each rank's own values; DDP and ZeRO start from rank 0's.
        model.to(accelerator.device)
        lay_out_contiguously(model)
        broadcast_tensors([*(p.data for p in model.parameters()), *model.buffers()])
        plugin = accelerator.state.fsdp_plugin
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = sorted(c.__name__ for c in repeated_classes(model))
        accelerator.prepare(model, optimizer)  # in place: the parameters become DTensors
        super().__init__(accelerator, model, optimizer, config)
        self.forward = self.evaluate = in_precision(model, config.precision, self.device)

    def accumulate(self) -> AbstractContextManager[Any]:
        """Gradients are not reduced inside."""
        return _without_reduction(self.model)

    def _number(self, norm: Tensor) -> float:
        # A collective: every rank has a shard of every gradient, possibly an empty one.
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def weights(self) -> dict[str, Tensor]:
        """This rank's shards (of length 0 where a parameter has fewer rows than there are ranks)."""
        return {name: _local(p.detach()) for name, p in self._named.items()}

    def weights_changed(self) -> None:
        """Free gathered copies: the root keeps its own after a forward pass without a backward pass."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def stored(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """DTensors that wrap the local memory."""
        return {name: self._like(name, tensor) for name, tensor in local.items()}

    def _like(self, name: str, tensor: Tensor) -> Tensor:
        p = self._named[name]
        if not isinstance(p, DTensor):
            return tensor
        return DTensor.from_local(
            tensor, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )

    def fill(self, local: Mapping[str, Tensor], source: TensorSource, prefix: str) -> None:
        """Read directly into the shards' memory."""
        source.read({prefix + name: tensor for name, tensor in self.stored(local).items()})

    def _gathered(self, tensor: Tensor) -> AbstractContextManager[Tensor]:
        return nullcontext(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _without_reduction(model: nn.Module) -> Iterator[None]:
    sharded = cast(FSDPModule, model)
    sharded.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        sharded.set_requires_gradient_sync(True)
