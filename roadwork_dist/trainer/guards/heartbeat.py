"""What each rank tells of itself in the run folder, and who is to blame when nothing moves."""

import faulthandler
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

FRAMES = 8
# Innermost lines of a process that may merely wait for another one, or for a GPU that does.
_MAY_WAIT = (
    "/torch/_ops.py",
    "/torch/autograd/graph.py",
    "/torch/nn/utils/clip_grad.py",
    "/roadwork_dist/trainer/step.py",
)
# The same, a few lines further out.
_WAITS = (
    "/torch/distributed/",
    "/accelerate/",
    "/deepspeed/",
    "/roadwork_dist/trainer/engine/collectives.py",
)
# The two kinds of lines that faulthandler writes.
_THREAD = re.compile(r"(?:Current thread|Thread) (?P<id>0x[0-9a-f]+)")
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')


@dataclass(frozen=True)
class Pulse:
    """A rank's word about itself.

    Attributes:
        rank: its number.
        host: its machine.
        pid: its process.
        beat: counts up as long as the process runs at all.
        step: optimizer steps taken.
        batches: batches read, those of validations included.
        phase: what the loop does.
        where: innermost lines of the thread that trains, innermost first, as ``file:line in function``; empty
            while the run moves.
    """

    rank: int
    host: str
    pid: int
    beat: int
    step: int
    batches: int
    phase: str
    where: list[str]

    @property
    def waits(self) -> bool:
        """Whether it may merely wait for another rank."""
        inner = any(part in line for line in self.where[:1] for part in _MAY_WAIT)
        return inner or any(part in line for line in self.where[:4] for part in _WAITS)

    def __str__(self) -> str:
        lines = " < ".join(map(_shortened, self.where)) or "an unknown line"
        return (
            f"rank {self.rank} (host {self.host}, process {self.pid}, last step {self.step}, {self.phase}) "
            f"in {lines}"
        )


def _shortened(line: str) -> str:
    path, found, rest = line.rpartition(".py:")
    return "/".join(path.split("/")[-2:]) + found + rest


def innermost_lines(thread: int) -> list[str]:
    """Where a thread of this process is, innermost first; empty if it has ended or cannot be seen."""
    # Not through sys._current_frames() and f_back: the collector may run while they make a frame object, let
    # the other thread go on, and the object then belongs to a call that is over (CPython 3.11: wrong lines,
    # or a crash much later). faulthandler reads the stack in one go and makes no objects.
    try:
        with _scratch() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            text = file.read().decode(errors="backslashreplace")
    except OSError:  # no room for it; the pulse itself says more than none at all
        return []
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if header := _THREAD.match(line):
            inside = int(header["id"], 16) == thread
        elif inside and (found := _FRAME.match(line)):
            lines.append(f"{found['file']}:{found['line']} in {found['name']}")
    return lines[:FRAMES]


def _scratch() -> IO[bytes]:
    """A file for a moment, in memory where the system has such: a full disk must not silence a rank."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stacks"), "w+b")
    return tempfile.TemporaryFile()


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def write_pulse(folder: Path, pulse: Pulse) -> None:
    """Replace a rank's file; not synced, since it means nothing after a crash of the machine."""
    temporary = folder / f".rank-{pulse.rank}.tmp"
    temporary.write_text(json.dumps(asdict(pulse)))
    temporary.replace(_path(folder, pulse.rank))


def read_pulses(folder: Path, ranks: int) -> list[Pulse | None]:
    """Every rank's file; None where there is none that can be read."""
    pulses: list[Pulse | None] = []
    for rank in range(ranks):
        try:
            pulses.append(Pulse(**json.loads(_path(folder, rank).read_text())))
        except (OSError, ValueError, TypeError):
            pulses.append(None)
    return pulses


def silent_ranks(before: Sequence[Pulse | None], now: Sequence[Pulse | None]) -> list[int]:
    """Ranks whose process has not run between two looks."""
    return [
        rank
        for rank, (old, new) in enumerate(zip(before, now, strict=True))
        if new is None or (old is not None and old.beat == new.beat)
    ]


def blame(before: Sequence[Pulse | None], now: Sequence[Pulse | None]) -> tuple[list[int], str]:
    """Ranks that hold the others up, and why they are named.

    Args:
        before: what each rank told a few looks ago; None = nothing.
        now: what each tells now.
    """
    if silent := silent_ranks(before, now):
        return silent, "shows no sign of life (dead, stopped, or its machine is gone)"
    pulses = [pulse for pulse in now if pulse is not None]
    busy = [pulse.rank for pulse in pulses if not pulse.waits]
    if busy and (len(busy) < len(pulses) or len(pulses) == 1):
        return busy, "does not come back from its own work"
    fewest = min(pulse.batches for pulse in pulses)
    behind = [pulse.rank for pulse in pulses if pulse.batches == fewest]
    if len(behind) < len(pulses):
        return behind, "is behind the others"
    return behind, "stands where all others stand (look at the network, the GPUs and the file system)"
