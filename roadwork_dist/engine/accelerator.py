"""The only place that builds an ``Accelerator`` and hands a model to it."""

import atexit
import os
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.optim import Optimizer

_PRECISIONS = {"fp32": "no", "bf16": "bf16"}


def build_accelerator(
    *, precision: Literal["fp32", "bf16"] = "fp32", device: Literal["auto", "cpu"] = "auto"
) -> Accelerator:
    """An Accelerator for one process, or for data parallel as the launcher's environment says.

    Started by ``torchrun`` or ``accelerate launch``, processes talk over NCCL on GPUs and over
    gloo on CPUs.

    Args:
        precision: ``bf16`` runs forward passes under autocast; weights stay in fp32.
        device: ``cpu`` ignores GPUs.
    """
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    was = PartialState._shared_state.get("device")
    if was is not None and (was.type == "cpu") != use_cpu and not torch.distributed.is_initialized():
        # Accelerate keeps the first device too: asked for a CPU later it raises, for a GPU it stays put.
        AcceleratorState._reset_state(reset_partial_state=True)
    known = AcceleratorState._shared_state
    if known and known.get("_mixed_precision") != _PRECISIONS[precision]:
        # Accelerate keeps the first precision for the whole process and refuses another; a notebook
        # that trains twice means the second one. Processes and device stay.
        AcceleratorState._reset_state()
    # Accumulation is the Trainer's: Accelerate would divide each loss by a fixed number, while a
    # mean over rows needs the rows of the whole optimizer step.
    atexit.unregister(_leave)
    atexit.register(_leave)
    return Accelerator(mixed_precision=_PRECISIONS[precision], cpu=use_cpu)


def share_cores(workers: int) -> None:
    """Leave a core to each loader process, unless ``OMP_NUM_THREADS`` says how many threads to use.

    Threads that outnumber the free cores wait for each other at every barrier: on two busy cores two
    threads took five times as long as one.

    Args:
        workers: loader processes of this process.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes - workers))


def _leave() -> None:
    """Leave the process group at exit; gloo's threads otherwise abort some processes that are done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, *, compile_mode: str = "off"
) -> tuple[nn.Module, Optimizer]:
    """Move a model to its device, compile it and make it data parallel where there are peers.

    The optimizer is left as it is: in fp32 and bf16 without a loss scaler Accelerate's wrapper
    changes nothing but the time of a step.

    Args:
        compile_mode: ``off``, or a mode of ``torch.compile``. The module is compiled in place, so
            names in its state dict keep no ``_orig_mod.`` prefix.
    """
    if compile_mode != "off":
        model.compile(mode=None if compile_mode == "default" else compile_mode)
    return accelerator.prepare_model(model), optimizer
