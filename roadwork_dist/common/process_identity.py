"""Identity of a process, by which another start can check whether it still runs."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, distinguished from later ones with the same pid.

    Attributes:
        host: name of the machine.
        pid: process id.
        started: start time in clock ticks since boot (Linux; else ""); independent of any clock that can be
            set.
        realm: boot id and pid namespace, since in another boot or container the same pid is another process.
    """

    host: str
    pid: int
    started: str
    realm: str


def own_identity() -> ProcessIdentity:
    """This process."""
    return ProcessIdentity(socket.gethostname(), os.getpid(), _start_of(os.getpid()), _realm())


def is_here(process: ProcessIdentity) -> bool:
    """Whether its pid is valid on this machine, boot and pid namespace."""
    return (process.host, process.realm) == (socket.gethostname(), _realm())


def is_alive(process: ProcessIdentity) -> bool:
    """Whether a process of this machine still runs (a zombie does not)."""
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # belongs to another user, but exists
        pass
    return _start_of(process.pid) == process.started


def _start_of(pid: int) -> str:
    """Field 22 of ``/proc/<pid>/stat``; "gone" for a process that has ended, "" without /proc."""
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        # The command name in parentheses may itself contain spaces and parentheses.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "gone"
    return "gone" if state in "ZX" else fields[18]


def _realm() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
