"""Builds the ``Accelerator`` of a run; nothing else does."""

import atexit
import copy
import os
import time
from importlib import import_module
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.optional import require
from roadwork_dist.trainer.engine.launcher import watch_launcher


def build_accelerator(*, device: Literal["auto", "cpu"] = "auto") -> Accelerator:
    """An Accelerator for the processes and the engine set by the launcher's environment.

    Processes started by ``torchrun`` or ``accelerate launch`` communicate over NCCL on GPUs and gloo on
    CPUs. ``accelerate launch --config_file`` selects the engine: none (one process, data parallel), FSDP2
    or DeepSpeed. bf16 is applied by the engine's autocast, not by Accelerate.

    Args:
        device: ``cpu`` ignores GPUs.

    Raises:
        ConfigError: FSDP version 1 is configured, or the launcher's variables are incomplete or no numbers.
        MissingDependencyError: DeepSpeed is configured but not installed.
    """
    _check_environment()
    watch_launcher()  # before this process waits for others that may never start
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    kept = PartialState._shared_state.get("device")
    if kept is not None and (kept.type == "cpu") != use_cpu and not torch.distributed.is_initialized():
        # Accelerate keeps its first device: a later request for the CPU raises, one for a GPU is ignored.
        AcceleratorState._reset_state(reset_partial_state=True)
    atexit.unregister(_leave_process_group)
    atexit.register(_leave_process_group)
    if use_cpu:  # Accelerate imports DeepSpeed if installed, which otherwise guesses the device and warns
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    kind = requested_engine()
    if kind == "replicated" or AcceleratorState._shared_state:
        accelerator = Accelerator(mixed_precision="no", cpu=use_cpu and kind == "replicated")
    else:
        accelerator = _sharded_accelerator(kind, use_cpu)
    _forget_last_model(accelerator, kind)
    return accelerator


_launched: dict[str, Any] = {}
"""What the launcher asked of the engine's plugin, before any Trainer of this process wrote into it."""


def _forget_last_model(accelerator: Accelerator, kind: str) -> None:
    """Put the plugin, which all Trainers of a process share, back to what the launcher asked for."""
    if kind == "zero":
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        launched = _launched.setdefault(kind, copy.deepcopy(config))
        config.clear()
        config.update(copy.deepcopy(launched))
    elif kind == "fsdp2":
        plugin = accelerator.state.fsdp_plugin
        names = _launched.setdefault(kind, (plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy))
        plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy = names


def _check_environment() -> None:
    """Refuse variables of a launcher that torch would end with a traceback for."""
    found = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    wrong = [f"{name}={value!r}" for name, value in found.items() if not value.lstrip("-").isdigit()]
    missing = [] if "LOCAL_RANK" not in found else [n for n in ("RANK", "WORLD_SIZE") if n not in found]
    if wrong or missing:
        told = (
            f"{', '.join(wrong)} is no whole number"
            if wrong
            else f"LOCAL_RANK is set, {', '.join(missing)} is not"
        )
        raise ConfigError(
            f"the environment is that of no launcher: {told}; start with `accelerate launch` or `torchrun`, "
            "or unset RANK, LOCAL_RANK and WORLD_SIZE to train in one process"
        )


def requested_engine() -> Literal["replicated", "fsdp2", "zero"]:
    """The engine set by the launcher's environment; a single process is never sharded."""
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
            # Otherwise it compiles its shared-memory collectives, which takes minutes, needs a C++ compiler
            # and serves inference only.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if use_cpu:
        # Accelerator(cpu=True) would drop both plugins, so only PartialState is set to the CPU. Accelerate
        # applies FSDP only if the distributed type is MULTI_GPU.
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
    # Accelerate registers ZeRO-3 with transformers, which would then shard every network it loads, including
    # the separate ones that compute features and sentence embeddings.
    accelerator.state.deepspeed_plugin.dschf = None
    import_module("transformers.integrations").unset_hf_deepspeed_config()
    return accelerator


def share_cores(workers: int) -> None:
    """Leave one core to each loader process, unless ``OMP_NUM_THREADS`` sets the number of threads.

    Threads that outnumber the free cores wait for each other at every barrier: on two busy cores two
    threads took five times as long as one.

    Args:
        workers: loader processes started by this process.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes - workers))


def _leave_process_group() -> None:
    """Destroy the process group at exit; otherwise gloo's threads abort some finished processes."""
    if torch.distributed.is_initialized():
        # A gloo thread frees the tensors of the last collective, for which it needs the GIL. Taking the GIL
        # while the interpreter shuts down aborts the process ("terminate called without an active
        # exception"). The data parallel wrapper may keep the group alive after its destruction, so nothing
        # joins the thread; sleeping here releases the GIL to it.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
