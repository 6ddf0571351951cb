"""Real processes for tests: forked from a server that has imported torch once, joined by gloo."""

import gc
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
# torch's optimizers import torch._dynamo at their first step, and DeepSpeed all that torch.compile needs:
# seconds, in every process.
_context.set_forkserver_preload(
    [
        *("roadwork_dist.recipes.pretrain", "sklearn.metrics"),
        *("torch._inductor.compile_fx", "torch.distributed.checkpoint"),
    ]
)


@dataclass(frozen=True)
class RankExit:
    """How one process ended: its exit code (negative = the signal) and what it returned."""

    code: int
    value: Any = None
    error: str = ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _main(
    pipe: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    os.environ.update(environment)
    import torch

    # What the fork server imported is garbage nowhere, and DeepSpeed collects garbage at every validation.
    gc.freeze()
    # A child of the fork server would start its loader workers through a fork server of its own.
    multiprocessing.set_start_method("fork", force=True)

    torch.set_num_threads(1)
    try:
        # Plain pickle: multiprocessing's own would pass tensors as shared memory of a dead process.
        pipe.send_bytes(pickle.dumps((function(*arguments), "")))
    except BaseException:
        pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
        os._exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def spawn(
    function: Callable[..., Any], *arguments: Any, world_size: int = 1, timeout: float = 180
) -> list[RankExit]:
    """Run ``function(*arguments)`` in ``world_size`` processes; a dead rank takes the others along.

    With more than one process they find each other through torchrun's environment variables.
    """
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes, pipes = [], []
    for rank in range(world_size):
        environment = dict(common)
        if world_size > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_main, args=(theirs, environment, function, arguments))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    alive = list(processes)
    while alive:
        ended = wait([process.sentinel for process in alive], timeout=timeout)
        alive = [process for process in alive if process.sentinel not in ended]
        if not ended or any(p.exitcode for p in processes if p not in alive):
            for process in alive:
                process.kill()
    results = []
    for process, pipe in zip(processes, pipes, strict=True):
        process.join()
        value, error = _message(pipe)
        results.append(RankExit(process.exitcode or 0, value, error))
        pipe.close()
    return results


def _message(pipe: Connection) -> tuple[Any, str]:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:  # the process was killed before it could say anything
        return None, ""


def run(function: Callable[..., Any], *arguments: Any, world_size: int = 1) -> list[Any]:
    """Like :func:`spawn`, for functions that must succeed: their values by rank."""
    exits = spawn(function, *arguments, world_size=world_size)
    errors = [f"rank {rank} (exit {e.code}):\n{e.error}" for rank, e in enumerate(exits) if e.code or e.error]
    assert not errors, "\n".join(errors)
    return [e.value for e in exits]
