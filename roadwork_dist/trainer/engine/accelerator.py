"""The only place that builds an ``Accelerator``."""

import atexit
import os
import time
from importlib import import_module
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.optional import require
from roadwork_dist.trainer.engine.launcher import watch_launcher


def build_accelerator(*, device: Literal["auto", "cpu"] = "auto") -> Accelerator:
    """An Accelerator for the processes and the engine that the launcher's environment names.

    Started by ``torchrun`` or ``accelerate launch``, processes talk over NCCL on GPUs and over gloo on
    CPUs. ``accelerate launch --config_file`` says which engine: none (one process, data parallel), FSDP2
    or DeepSpeed. bf16 is the engine's autocast, not Accelerate's.

    Args:
        device: ``cpu`` ignores GPUs.

    Raises:
        ConfigError: FSDP version 1 is asked for.
        MissingDependencyError: DeepSpeed is asked for and not installed.
    """
    watch_launcher()  # before this process waits for others that may never come
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    was = PartialState._shared_state.get("device")
    if was is not None and (was.type == "cpu") != use_cpu and not torch.distributed.is_initialized():
        # Accelerate keeps the first device too: asked for a CPU later it raises, for a GPU it stays put.
        AcceleratorState._reset_state(reset_partial_state=True)
    atexit.unregister(_leave)
    atexit.register(_leave)
    if use_cpu:  # Accelerate imports DeepSpeed where it is installed, which else guesses and warns
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    kind = requested_engine()
    if kind == "replicated" or AcceleratorState._shared_state:
        return Accelerator(mixed_precision="no", cpu=use_cpu and kind == "replicated")
    return _sharded_accelerator(kind, use_cpu)


def requested_engine() -> Literal["replicated", "fsdp2", "zero"]:
    """The engine that the launcher's environment names; a single process needs none of the sharded ones."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return "replicated"
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return "zero"
    return "fsdp2" if _is_on("ACCELERATE_USE_FSDP") else "replicated"


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _sharded_accelerator(kind: Literal["fsdp2", "zero"], use_cpu: bool) -> Accelerator:
    if kind == "zero":
        deepspeed = require("deepspeed", extra="deepspeed", purpose="DeepSpeed ZeRO")
        if use_cpu:
            # Else it compiles its shared memory collectives, which takes minutes and a C++ compiler, for
            # inference alone.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if use_cpu:
        # Accelerator(cpu=True) would drop both plugins. The processes' state alone has to know of the CPU;
        # FSDP is taken up only beside what Accelerate calls MULTI_GPU.
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if kind == "fsdp2":
        plugin = FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise ConfigError(
                f"the launcher's configuration asks for FSDP version {plugin.fsdp_version}, expected 2: set "
                "fsdp_version: 2 in its fsdp_config"
            )
        return Accelerator(mixed_precision="no", fsdp_plugin=plugin)
    accelerator = Accelerator(mixed_precision="no")
    # Accelerate tells transformers of ZeRO-3, which would then cut every network it loads into shards, also
    # those that run by themselves to compute features and sentence embeddings.
    accelerator.state.deepspeed_plugin.dschf = None
    import_module("transformers.integrations").unset_hf_deepspeed_config()
    return accelerator


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
        # A gloo thread frees the tensors of the last collective, for which it needs Python's lock: once the
        # interpreter ends, asking for that aborts the process ("terminate called without an active
        # exception"). The group may outlive its destruction, in the data parallel wrapper, so nothing
        # joins the thread; asleep, this one leaves it the lock.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
