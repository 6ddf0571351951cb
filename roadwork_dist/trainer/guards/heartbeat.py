"""Heartbeat files of all ranks in the run folder, and which ranks are to blame for a hang."""

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
# Innermost frame of a process that may only be waiting for another rank, or for a GPU that waits.
_MAY_WAIT = (
    "/torch/_ops.py",
    "/torch/autograd/graph.py",
    "/torch/nn/utils/clip_grad.py",
    "/roadwork_dist/trainer/step.py",
)
# The same, within the innermost four frames.
_WAITS = (
    "/torch/distributed/",
    "/accelerate/",
    "/deepspeed/",
    "/roadwork_dist/trainer/engine/collectives.py",
)
# The two kinds of lines in faulthandler's output.
_THREAD = re.compile(r"(?:Current thread|Thread) (?P<id>0x[0-9a-f]+)")
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank is in the training loop.

    Attributes:
        rank: its number.
        host: name of its machine.
        pid: its process id.
        beat: increases as long as the process runs at all.
        step: optimizer steps taken.
        batches: batches read, including those of validations.
        phase: phase of the loop.
        where: innermost frames of the training thread, innermost first, as ``file:line in function``; empty
            while the run makes progress.
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
        """Whether it may only be waiting for another rank."""
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
    """Frames of a thread of this process, innermost first; empty if it has ended or cannot be read."""
    # Not with sys._current_frames() and f_back: while they create a frame object, the garbage collector may
    # run and let the other thread continue, so the object can outlive its call (CPython 3.11: wrong lines,
    # or a crash much later). faulthandler reads the whole stack at once and creates no objects.
    try:
        with _scratch() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            text = file.read().decode(errors="backslashreplace")
    except OSError:  # no space for it; a heartbeat without frames is better than none
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
    """A temporary file, in memory if possible, since a full disk must not silence a rank."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stacks"), "w+b")
    return tempfile.TemporaryFile()


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def write_heartbeat(folder: Path, heartbeat: Heartbeat) -> None:
    """Replace a rank's file; not synced, since it is worthless after a crash of the machine."""
    temporary = folder / f".rank-{heartbeat.rank}.tmp"
    temporary.write_text(json.dumps(asdict(heartbeat)))
    temporary.replace(_path(folder, heartbeat.rank))


def read_heartbeats(folder: Path, ranks: int) -> list[Heartbeat | None]:
    """The heartbeat of every rank; None if its file is missing or damaged."""
    heartbeats: list[Heartbeat | None] = []
    for rank in range(ranks):
        try:
            heartbeats.append(Heartbeat(**json.loads(_path(folder, rank).read_text())))
        except (OSError, ValueError, TypeError):
            heartbeats.append(None)
    return heartbeats


def silent_ranks(before: Sequence[Heartbeat | None], now: Sequence[Heartbeat | None]) -> list[int]:
    """Ranks whose process has not run between two readings."""
    return [
        rank
        for rank, (old, new) in enumerate(zip(before, now, strict=True))
        if new is None or (old is not None and old.beat == new.beat)
    ]


def blame(before: Sequence[Heartbeat | None], now: Sequence[Heartbeat | None]) -> tuple[list[int], str]:
    """Ranks that block the others, and the reason.

    Args:
        before: heartbeat of each rank a few intervals ago; None = none.
        now: current heartbeat of each rank.
    """
    if silent := silent_ranks(before, now):
        return silent, "shows no sign of life (dead, stopped, or its machine is gone)"
    heartbeats = [heartbeat for heartbeat in now if heartbeat is not None]
    busy = [heartbeat.rank for heartbeat in heartbeats if not heartbeat.waits]
    if busy and (len(busy) < len(heartbeats) or len(heartbeats) == 1):
        return busy, "does not return from its own work"
    fewest = min(heartbeat.batches for heartbeat in heartbeats)
    behind = [heartbeat.rank for heartbeat in heartbeats if heartbeat.batches == fewest]
    if len(behind) < len(heartbeats):
        return behind, "is behind the others"
    return behind, "hangs at the same point as all others (check the network, the GPUs and the file system)"
