"""Progress of what comes before training: a bar on a terminal, a line at the end elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(name: str, accelerator: Accelerator | None = None) -> Iterator[Callable[[int, int], None]]:
    """Give a function that is told (done, total); only the first of several processes shows it."""
    if accelerator is not None and not accelerator.is_main_process:
        yield lambda done, total: None
        return
    if accelerator is not None and accelerator.num_processes > 1:
        name += f" (this process's share of {accelerator.num_processes})"
    console = Console(highlight=False, markup=False, soft_wrap=True)
    started, seen = time.monotonic(), (0, 0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(name)

        def tell(done: int, total: int) -> None:
            nonlocal seen
            seen = (done, total)
            progress.update(task, completed=done, total=total)

        yield tell
    console.print(f"{name}: {seen[0]} of {seen[1]}, {time.monotonic() - started:.1f} s")
