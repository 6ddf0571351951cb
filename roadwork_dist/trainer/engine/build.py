"""From a model to the engine that the launcher asked for."""

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.engine.base import Engine
from roadwork_dist.trainer.engine.blocks import compile_model
from roadwork_dist.trainer.engine.fp8 import use_fp8
from roadwork_dist.trainer.engine.native import Replicated


def build_engine(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, config: TrainConfig
) -> Engine:
    """Move a model to its device, compile it, and spread it over the processes.

    Args:
        accelerator: says which engine.
        model: changed in place.
        optimizer: over its trainable parameters; changed in place, and still the one that steps.
        config: precision, clipping, compilation.
    """
    if config.precision == "fp8":
        use_fp8(model, accelerator.device)
    if config.compile != "off":
        compile_model(model, config.compile, regional=config.compile_regions)
    if accelerator.distributed_type == DistributedType.FSDP:
        from roadwork_dist.trainer.engine.fsdp import Fsdp2

        return Fsdp2(accelerator, model, optimizer, config)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from roadwork_dist.trainer.engine.zero import Zero

        return Zero(accelerator, model, optimizer, config)
    return Replicated(accelerator, model, optimizer, config)
