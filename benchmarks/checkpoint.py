"""Cost of saving, against ``accelerator.save_state``, and duration of resuming.

Saving: a model of linear layers is trained with AdamW and a moving average, in this process or in those of a
launcher, and saved every few steps: by this package, synchronously and in the background, and by Accelerate,
which stores the same tensors (model, moments, average) without checksums and without syncing them to disk.
*Blocked* is how long training was blocked. The three take turns; figures are medians over all saves.

Resuming: seconds from ``fit()`` to the end of the first step, after batch 10 and after batch 100,000 of an
epoch, and the rows that were read for it.

    python benchmarks/checkpoint.py
    torchrun --nproc-per-node 2 benchmarks/checkpoint.py
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measuring import hardware
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from roadwork_dist.common.errors import InterruptedRunError
from roadwork_dist.trainer.config import (
    CheckpointConfig,
    EmaConfig,
    OptimConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainConfig,
)
from roadwork_dist.trainer.engine.accelerator import build_accelerator
from roadwork_dist.trainer.engine.collectives import broadcast_object
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.trainer import Trainer

WIDTH, BATCH, FEATURES, RESUMED_BATCH = 1024, 8, 64, 4
"""Width of the linear layers; rows per step while saving; inputs; rows per step while resuming."""
PLACES = (10, 100_000)
"""Batches of an epoch after which a run is resumed."""


@dataclass(frozen=True)
class Save:
    """Seconds and bytes of one save."""

    blocked: float
    total: float
    size: float


@dataclass(frozen=True)
class Resume:
    """Seconds until the end of the first step, and rows read until then."""

    seconds: float
    rows: int


def network(millions: float) -> nn.Module:
    """Linear layers with ``millions`` million parameters."""
    torch.manual_seed(0)
    layers = max(1, round(millions * 1e6 / (WIDTH * WIDTH + WIDTH)))
    hidden = [part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), *hidden, nn.Linear(WIDTH, 2))


def rows(count: int) -> TensorDataset:
    """Random inputs and labels."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(count, FEATURES, generator=generator), torch.randint(2, (count,), generator=generator)
    )


def settings(folder: Path, batch: int, checkpoint: CheckpointConfig) -> TrainConfig:
    """One epoch without figures on screen."""
    return TrainConfig(
        output_dir=str(folder),
        epochs=1,
        batch_size=batch,
        device="cpu",
        optim=OptimConfig(lr=1e-4),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
        ema=EmaConfig(decay=0.99),
        checkpoint=checkpoint,
        tracking=TrackingConfig(progress=False, health_every=0),
    )


def save_with_trainer(
    folder: Path, millions: float, every: int, saves: int, in_background: bool
) -> list[Save]:
    """Saves of this package, as reported in its metrics."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    data = rows(BATCH * processes * (every * saves + 1))
    checkpoint = CheckpointConfig(every_steps=every, keep=1, asynchronous=in_background)
    Trainer(network(millions), settings(folder, BATCH, checkpoint), data).fit()
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    saves_made = [line for line in lines if line["kind"] == "checkpoint"]
    # The last save is at the end of the epoch and always synchronous.
    return [Save(each["seconds_blocked"], each["seconds_total"], each["bytes"]) for each in saves_made[:-1]]


class Average(nn.Module):
    """The moving average that Accelerate stores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shadow = nn.ParameterList(p.detach().clone() for p in model.parameters())


def save_with_accelerate(folder: Path, millions: float, every: int, saves: int) -> list[Save]:
    """Saves of ``accelerator.save_state`` in a plain loop."""
    accelerator = build_accelerator(device="cpu")
    model = network(millions)
    average = Average(model)
    accelerator.register_for_checkpointing(average)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4))
    inputs, labels = rows(BATCH)[:]
    found = []
    for number in range(every * saves):
        accelerator.backward(nn.functional.cross_entropy(prepared(inputs), labels))
        optimizer.step()
        optimizer.zero_grad()
        if (number + 1) % every == 0:
            accelerator.wait_for_everyone()
            started = time.perf_counter()
            accelerator.save_state(str(folder / "state"))
            accelerator.wait_for_everyone()
            seconds = time.perf_counter() - started
            size = sum(path.stat().st_size for path in (folder / "state").rglob("*") if path.is_file())
            found.append(Save(seconds, seconds, size))
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    return found


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A temporary folder shared by all ranks."""
    with tempfile.TemporaryDirectory() as own:
        yield Path(broadcast_object(own))
        build_accelerator(device="cpu").wait_for_everyone()  # no rank deletes it before all are done


def measure_saves(millions: float, every: int, saves: int, turns: int) -> dict[str, list[Save]]:
    """Saves of the three methods, in turns."""
    found: dict[str, list[Save]] = {"roadwork_dist": [], "roadwork_dist, asynchronous": [], "save_state": []}
    for turn in range(-1, turns):  # turn -1 imports and warms up
        for name, known in found.items():
            with shared_folder() as folder, redirect_stdout(io.StringIO()):
                if name == "save_state":
                    new = save_with_accelerate(folder, millions, every, saves)
                else:
                    new = save_with_trainer(folder, millions, every, saves, in_background="async" in name)
            if turn >= 0:
                known += new
    return found


class CountedRows(TensorDataset):
    """Counts the rows that are read."""

    read = 0

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        self.read += len(indices)
        return [self[index] for index in indices]


class GoTo(Callback):
    """Sets the position in the epoch to ``place`` at once, and requests a stop there."""

    def __init__(self, place: int) -> None:
        self.place = place

    def on_step_end(self, run: Any, result: Any) -> None:
        """Request the stop in the first step; set the position in the second, which is saved."""
        run.interrupt_requested = True
        if result.interrupted:
            run.state.step = run.state.step_in_epoch = self.place


class FirstStep(Callback):
    """Notes the end of the first step, and stops there."""

    at = 0.0

    def on_step_end(self, run: Any, result: Any) -> None:
        """Take the time."""
        self.at = self.at or time.perf_counter()
        run.interrupt_requested = True


def fit_until_asked(folder: Path, data: TensorDataset, callback: Callback) -> float:
    """Train until the callback requests a stop; returns the time at which ``fit`` began."""
    trainer = Trainer(
        network(0), settings(folder, RESUMED_BATCH, CheckpointConfig()), data, callbacks=[callback]
    )
    started = time.perf_counter()
    with suppress(InterruptedRunError):
        trainer.fit()
    return started


def measure_resumes(turns: int) -> dict[int, list[Resume]]:
    """Resumes at each place, in turns."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    data = CountedRows(*rows(RESUMED_BATCH * processes * (max(PLACES) + 100)).tensors)
    found: dict[int, list[Resume]] = {place: [] for place in PLACES}
    for turn in range(-1, turns):
        for place, known in found.items():
            with shared_folder() as folder, redirect_stdout(io.StringIO()):
                fit_until_asked(folder, data, GoTo(place))
                data.read, first = 0, FirstStep()
                started = fit_until_asked(folder, data, first)
            if turn >= 0:
                known.append(Resume(first.at - started, data.read))
    return found


def saves_table(found: dict[str, list[Save]]) -> str:
    """Markdown: medians of every method to save."""
    lines = ["| save | seconds blocked | seconds total | MB | saves |", "|---|--:|--:|--:|--:|"]
    for name, saves in found.items():
        blocked, total, size = (
            statistics.median(getattr(save, part) for save in saves) for part in ("blocked", "total", "size")
        )
        lines.append(f"| {name} | {blocked:.3f} | {total:.3f} | {size / 1e6:.1f} | {len(saves)} |")
    return "\n".join(lines)


def resumes_table(found: dict[int, list[Resume]]) -> str:
    """Markdown: medians at every place."""
    lines = [
        "| resumed after batch | seconds to the first step | rows read | resumes |",
        "|--:|--:|--:|--:|",
    ]
    for place, resumes in found.items():
        seconds = statistics.median(resume.seconds for resume in resumes)
        read = max(resume.rows for resume in resumes)
        lines.append(f"| {place:,} | {seconds:.3f} | {read} | {len(resumes)} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Measure and print (rank 0)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=float, default=25, help="of parameters (default 25)")
    parser.add_argument("--every", type=int, default=8, help="steps from save to save (default 8)")
    parser.add_argument("--saves", type=int, default=4, help="saves of a turn (default 4)")
    parser.add_argument("--turns", type=int, default=3, help="of each method to save (default 3)")
    parser.add_argument("--resumes", type=int, default=5, help="of each place (default 5)")
    arguments = parser.parse_args(words)
    warnings.simplefilter("ignore")
    accelerator = build_accelerator(device="cpu")
    before = hardware()
    saves = measure_saves(arguments.millions, arguments.every, arguments.saves, arguments.turns)
    resumes = measure_resumes(arguments.resumes)
    if accelerator.is_main_process:
        given = sys.argv[1:] if words is None else words
        print(f"{date.today()} · {' '.join(['python benchmarks/checkpoint.py', *given])}")
        print(f"{before} at the start, {os.getloadavg()[0]:.1f} at the end")
        print(", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate")))
        print(
            f"{arguments.millions:g} M parameters, moments, average; {accelerator.num_processes} processes\n"
        )
        print(f"{saves_table(saves)}\n\n{resumes_table(resumes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
