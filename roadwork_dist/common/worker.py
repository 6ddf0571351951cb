"""Shields loader processes from signals that are meant for the training process."""

import os
import signal
import sys
import threading

# Schedulers send these to all processes of a job at once. The trainer handles them after its step, and needs
# its loader processes until then.
_FOR_THE_TRAINER = ("SIGTERM", "SIGUSR1")


def shield_worker(number: int) -> None:
    """Let a loader process survive a request to stop, but not the process that it reads for.

    Linux only; elsewhere loader processes keep torch's behaviour and end at SIGTERM.

    Args:
        number: of the worker; torch passes it to a ``worker_init_fn``.
    """
    if not sys.platform.startswith("linux"):
        return
    numbers = {getattr(signal, name) for name in _FOR_THE_TRAINER}
    parent = os.getppid()
    end_with_parent()
    # Blocked rather than ignored: a waiting thread learns the sender of a signal, and the trainer's own
    # SIGTERM (multiprocessing ends its children with it) must still work. Threads inherit the mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    threading.Thread(target=_handle_signals, args=(numbers, parent), daemon=True, name="signals").start()


def _handle_signals(numbers: set[int], parent: int) -> None:
    """End this process at its parent's SIGTERM; discard all other signals."""
    while True:
        received = signal.sigwaitinfo(numbers)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)


def end_with_parent(parent: int | None = None) -> None:
    """Receive SIGKILL when the parent dies: torch checks for that every 5 s, and only between rows.

    Args:
        parent: id of the process that started this one, if known: it may already be dead.
    """
    import ctypes

    parent = os.getppid() if parent is None else parent
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # died in between
        os._exit(1)
