"""Progress display of the steps before training: a bar in a terminal, occasional lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINE_EVERY_S = 30.0
"""Interval of the lines that are printed without a terminal."""


class Pace:
    """Rate and remaining time of work, a part of which may have been done earlier.

    Args:
        clock: current time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, clock()
        self.before: int | None = None
        self.done = self.total = 0

    def update(self, done: int, total: int) -> None:
        """Update the progress; the first call sets what was done earlier."""
        self.before = done if self.before is None else self.before
        self.done, self.total = done, total

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    @property
    def rate(self) -> float:
        """Items per second since the start."""
        return (self.done - (self.before or 0)) / max(self.seconds, 1e-9)

    def left(self) -> str:
        """Remaining time at this rate, such as ``1:02:03``."""
        if not self.rate:
            return "-:--:--"
        minutes, seconds = divmod(round((self.total - self.done) / self.rate), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


@contextmanager
def progress_bar(
    name: str, accelerator: Accelerator | None = None, unit: str = ""
) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (done, total); only the main process shows the progress.

    Args:
        name: description of the work.
        accelerator: identifies this process; ``None`` = the only process.
        unit: unit of the items, shown with their rate; "" = show no rate.
    """
    if accelerator is not None and not accelerator.is_main_process:
        yield lambda done, total: None
        return
    if accelerator is not None and accelerator.num_processes > 1:
        name += f" (this process's share of {accelerator.num_processes})"
    console = Console(highlight=False, markup=False, soft_wrap=True)
    pace, next_line = Pace(), LINE_EVERY_S
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        TextColumn("{task.fields[pace]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(name, pace="")

        def advance(done: int, total: int) -> None:
            nonlocal next_line
            pace.update(done, total)
            speed = f"{pace.rate:.1f} {unit}/s, " if unit else ""
            progress.update(task, completed=done, total=total, pace=f"{speed}{pace.left()} left")
            if not console.is_terminal and pace.seconds >= next_line:
                next_line = pace.seconds + LINE_EVERY_S
                console.print(f"{name}: {done} of {total}, {speed}{pace.left()} left")

        yield advance
    line = f"{name}: {pace.done} of {pace.total}, {pace.seconds:.1f} s"
    if unit and pace.before:
        line += f", {pace.before} were there"
    if unit and pace.done > (pace.before or 0):
        line += f", {pace.rate:.1f} {unit}/s"
    console.print(line)
