"""Says in one line what torch tells of a killed loader process, a lost rank or weights without a gradient."""

import re
import time
import traceback

import torch
from torch.utils.data._utils import signal_handling

from roadwork_dist.common.errors import ConfigError, LoaderWorkerError, LostPeerError

# torch/csrc/DataLoader.cpp and torch/utils/data/dataloader.py
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_SIGNAL = re.compile(r"killed by signal: ([^.]+)")
# gloo's pairs, c10d's store, NCCL
_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Socket closed|recv failed|"
    r"remote process exited|ncclRemoteError|NCCL communicator was aborted|Connection refused"
)

# torch/csrc/distributed/c10d/reducer.cpp
_UNUSED = re.compile(r"Expected to have finished reduction in the prior iteration")
_INDICES = re.compile(r"Parameter indices which did not receive grad for rank \d+: ([\d ]+)")


def explained(error: BaseException) -> BaseException:
    """An error with a clear line in place of torch's; the same error where there is nothing to explain.

    Args:
        error: what ended training.
    """
    if isinstance(error, (OSError, EOFError)) and _is_from_loader(error):
        error = _death_of_a_worker() or error
    if not isinstance(error, RuntimeError):
        return error
    chain = _chain(error)
    for text in chain:
        if found := _WORKER.search(text):
            signals = [match[1].strip() for other in chain if (match := _SIGNAL.search(other))]
            return LoaderWorkerError(_worker_line(found[1].strip(), signals[0] if signals else ""))
    if _UNUSED.search(str(error)):
        found = _INDICES.search(str(error))
        which = _numbers(found[1]) if found else ""
        return ConfigError(
            f"weights that are to be trained got no gradient on this rank{which}: freeze what the loss does "
            "not use (requires_grad_(False)); give what only some batches use a part of every loss "
            "(0 * weight.sum())"
        )
    is_about_peers = isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)
    if is_about_peers and (found := _PEER.search(str(error))):
        return LostPeerError(
            f"another rank has ended ({found[0]}): its own message, or the kernel's log on its host, says "
            "why; the last checkpoint is untouched, start again to go on from there"
        )
    return error


def _numbers(indices: str) -> str:
    count = len(indices.split())
    shown = ", ".join(indices.split()[:8]) + (", …" if count > 8 else "")
    return f" (number {shown} of the model's parameters that require one, counted from 0)"


def _is_from_loader(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename.endswith("torch/utils/data/dataloader.py") for frame, _ in frames)


def _death_of_a_worker() -> RuntimeError | None:
    """What torch says of a dead loader process, whose pipe breaks a moment before the kernel tells of it."""
    ended = time.monotonic() + 1.0
    try:
        while time.monotonic() < ended:
            # torch's own handler of SIGCHLD calls it too.
            signal_handling._error_if_any_worker_fails()  # type: ignore[attr-defined]
            time.sleep(0.02)
    except RuntimeError as death:
        return death
    return None


def _chain(error: BaseException | None) -> list[str]:
    """Texts of an error and of those that led to it."""
    texts: list[str] = []
    while error is not None and len(texts) < 10:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return texts


def _worker_line(pids: str, signal: str) -> str:
    if signal in ("", "Killed"):
        hint = (
            "most likely by the kernel for want of memory (see `dmesg`): lower workers or batch_size, "
            "or ask for more memory"
        )
    elif "Bus error" in signal:
        hint = "/dev/shm is probably full: lower workers, or give the container more shared memory"
    else:
        hint = "see the message of that process above"
    return (
        f"loader process {pids} was ended{f' by signal: {signal}' if signal else ''}, {hint}; the last "
        "checkpoint is untouched, start again to go on from there"
    )
