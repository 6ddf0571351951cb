"""Builds the engine that the launcher's configuration selects."""

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.engine.base import Engine
from roadwork_dist.trainer.engine.blocks import compile_model
from roadwork_dist.trainer.engine.fp8 import use_fp8
from roadwork_dist.trainer.engine.native import Replicated


def engine_class(accelerator: Accelerator) -> type[Engine]:
    """The engine that the launcher's configuration selects."""
    if accelerator.distributed_type == DistributedType.FSDP:
        from roadwork_dist.trainer.engine.fsdp import Fsdp2

        return Fsdp2
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from roadwork_dist.trainer.engine.zero import Zero

        return Zero
    return Replicated


def build_engine(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, config: TrainConfig
) -> Engine:
    """Move a model to its device, compile it, and distribute it over the processes.

    Args:
        accelerator: selects the engine.
        model: changed in place.
        optimizer: over its trainable parameters; changed in place, not replaced.
        config: precision, clipping, compilation.
    """
    if config.precision == "fp8":
        use_fp8(model, accelerator.device)
    if config.compile != "off":
        compile_model(model, config.compile, regional=config.compile_regions)
    return engine_class(accelerator)(accelerator, model, optimizer, config)
