"""Shared by the benchmarks: alternating turns, medians with their spread, and the hardware."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path

Times = dict[str, list[float]]
"""Seconds of every candidate, one value per turn."""


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Time every candidate once per turn, so that a busy machine slows all of them.

    The order rotates from turn to turn; an untimed first turn imports and warms up. If other processes use
    the machine and all work is on the CPU, ``time.process_time`` is the fairer clock.
    """
    names = list(candidates)
    times: Times = {name: [] for name in names}
    for turn in range(-1, turns):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            candidates[name]()
            if turn >= 0:
                times[name].append(clock() - start)
    return times


def ratios(times: Times, of: str, to: str) -> list[float]:
    """Time of ``of`` over time of ``to``, turn by turn."""
    return [own / other for own, other in zip(times[of], times[to], strict=True)]


def median_and_spread(values: list[float], sign: str = "", digits: int = 3) -> str:
    """Median and interquartile range, as two cells of a table."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):{sign}.{digits}f} | {high - low:.{digits}f}"


def hardware() -> str:
    """Processor, cores and load."""
    info = Path("/proc/cpuinfo")
    names = [s for s in info.read_text().splitlines() if s.startswith("model name")] if info.exists() else []
    model = names[0].split(": ")[-1] if names else platform.processor()
    return f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def heading(*packages: str) -> str:
    """Date, command, hardware and versions: the heading of every table."""
    command = " ".join(["python", *sys.argv])
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    return f"{date.today()} · {command}\n{hardware()}\n{versions}\n"
