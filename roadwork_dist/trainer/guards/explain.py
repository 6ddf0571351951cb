"""Replaces torch's errors about killed loader processes, lost ranks and unused weights by clear messages."""

import re
import time
import traceback

import torch
from torch.utils.data._utils import signal_handling

from roadwork_dist.common.errors import ConfigError, LoaderWorkerError, LostPeerError

# torch/csrc/DataLoader.cpp and torch/utils/data/dataloader.py
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_SIGNAL = re.compile(r"killed by signal: ([^.]+)")
# messages of gloo's pairs, c10d's store and NCCL
_PEER = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Socket closed|recv failed|"
    r"remote process exited|ncclRemoteError|NCCL communicator was aborted|Connection refused"
)

# torch/csrc/distributed/c10d/reducer.cpp
_UNUSED = re.compile(r"Expected to have finished reduction in the prior iteration")
_INDICES = re.compile(r"Parameter indices which did not receive grad for rank \d+: ([\d ]+)")


def explained(error: BaseException) -> BaseException:
    """A clearer error in place of torch's; the same error if there is nothing to explain.

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
            f"trainable weights got no gradient on this rank{which}: freeze weights that the loss never uses "
            "(requires_grad_(False)); add weights that only some batches use to every loss "
            "(0 * weight.sum())"
        )
    is_about_peers = isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)
    if is_about_peers and (found := _PEER.search(str(error))):
        return LostPeerError(
            f"another rank has ended ({found[0]}): its own message, or the kernel's log on its host, says "
            "why; the last checkpoint is untouched, start again to resume from it"
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
    """The error of torch about a dead loader process; its pipe breaks a moment before SIGCHLD arrives."""
    ended = time.monotonic() + 1.0
    try:
        while time.monotonic() < ended:
            # torch's own SIGCHLD handler calls it as well.
            signal_handling._error_if_any_worker_fails()  # type: ignore[attr-defined]
            time.sleep(0.02)
    except RuntimeError as death:
        return death
    return None


def _chain(error: BaseException | None) -> list[str]:
    """Messages of an error and of its causes."""
    texts: list[str] = []
    while error is not None and len(texts) < 10:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return texts


def _worker_line(pids: str, signal: str) -> str:
    if signal in ("", "Killed"):
        hint = (
            "most likely by the kernel because memory ran out (see `dmesg`): lower workers or batch_size, "
            "or request more memory"
        )
    elif "Bus error" in signal:
        hint = "/dev/shm is probably full: lower workers, or give the container more shared memory"
    else:
        hint = "see its own message above"
    return (
        f"loader process {pids} was ended{f' by signal: {signal}' if signal else ''}, {hint}; the last "
        "checkpoint is untouched, start again to resume from it"
    )
