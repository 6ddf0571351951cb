"""Which process this is, so that another start can tell whether it still runs."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, told apart from later ones that get the same number.

    Attributes:
        host: name of the machine.
        pid: number of the process.
        started: when it started, in clock ticks since the machine did (Linux; else ""): no clock that
            can be set has a part in it.
        realm: boot and pid namespace: the numbers of another container or boot mean other processes.
    """

    host: str
    pid: int
    started: str
    realm: str


def own_identity() -> ProcessIdentity:
    """This process."""
    return ProcessIdentity(socket.gethostname(), os.getpid(), _start_of(os.getpid()), _realm())


def is_here(process: ProcessIdentity) -> bool:
    """Whether its number means something on this machine."""
    return (process.host, process.realm) == (socket.gethostname(), _realm())


def is_alive(process: ProcessIdentity) -> bool:
    """Whether a process of this machine still runs (a zombie does not)."""
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, but it is there
        pass
    return _start_of(process.pid) == process.started


def _start_of(pid: int) -> str:
    """Field 22 of ``/proc/<pid>/stat``; "gone" for a process that has ended, "" where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        # The name in parentheses may hold spaces and parentheses.
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
