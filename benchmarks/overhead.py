"""Time that training loops add to a step of a bare PyTorch loop, on one CPU thread.

Every loop trains the same tiny network on the same data with the same recipe (AdamW, clipping at 1.0, a
DataLoader in the training process) for the same number of steps. The network is so small that the loop
is a large part of the time. Loops take turns, so that a busy machine slows all of them. Figures
are medians over the turns; added time is relative to the bare loop of the same turn, and also computed
between the fastest turns of each, which other processes disturbed least.

    python benchmarks/overhead.py
"""

import argparse
import io
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measuring import hardware, median_and_spread
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

BATCH, LR, WARMUP_STEPS = 32, 1e-3, 50
"""Rows per step, learning rate, and untimed steps at the start of every run."""


def network() -> nn.Module:
    """A perceptron 64 → 256 → 256 → 10."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def synthetic_rows(steps: int) -> TensorDataset:
    """Random inputs and labels, enough for ``steps`` steps."""
    generator = torch.Generator().manual_seed(0)
    rows = steps * BATCH
    return TensorDataset(
        torch.randn(rows, 64, generator=generator), torch.randint(10, (rows,), generator=generator)
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW that decays matrices only, like the two Trainers that build their own optimizer."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR)


class Clock:
    """Measures the mean time of a step after the warm-up; ``tick`` is called after every step."""

    def __init__(self, steps: int) -> None:
        self._left, self._steps = WARMUP_STEPS, steps
        self._start, self.ms = 0.0, 0.0

    def tick(self) -> None:
        """A step ended."""
        self._left -= 1
        if self._left == 0:
            self._start = time.perf_counter()
        elif self._left == -self._steps:
            self.ms = (time.perf_counter() - self._start) / self._steps * 1000


def bare(data: TensorDataset, clock: Clock, folder: Path) -> None:
    """PyTorch alone."""
    model = network()
    optimizer = adamw(model)
    for inputs, labels in DataLoader(data, BATCH, shuffle=True):
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick()


def bare_accelerate(data: TensorDataset, clock: Clock, folder: Path) -> None:
    """Accelerate alone."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer = adamw(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, BATCH, shuffle=True))
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        clock.tick()


def roadwork_dist(
    data: TensorDataset, clock: Clock, folder: Path, model: Callable[[], nn.Module] = network
) -> None:
    """This package, with a line of JSON per step and the moving average."""
    from roadwork_dist.trainer.config import OptimConfig, ScheduleConfig, TrackingConfig, TrainConfig
    from roadwork_dist.trainer.events.callback import Callback
    from roadwork_dist.trainer.trainer import Trainer

    class Ticks(Callback):
        def on_step_end(self, run: Any, result: Any) -> None:
            clock.tick()

    config = TrainConfig(
        output_dir=str(folder / "roadwork_dist"),
        epochs=1,
        batch_size=BATCH,
        device="cpu",
        optim=OptimConfig(lr=LR),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
        tracking=TrackingConfig(progress=False),
    )
    Trainer(model(), config, data, callbacks=[Ticks()]).fit()


def transformers_trainer(data: TensorDataset, clock: Clock, folder: Path) -> None:
    """Transformers' Trainer with default settings, without logging."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Ticks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.network(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {"inputs": torch.stack([r[0] for r in rows]), "labels": torch.stack([r[1] for r in rows])}

    arguments = TrainingArguments(
        output_dir=str(folder / "transformers"),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=1.0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    Trainer(WithLoss(), arguments, collate, data, callbacks=[Ticks()]).train()


def lightning(data: TensorDataset, clock: Clock, folder: Path) -> None:
    """Lightning's Trainer without logger, progress bar and checkpoints."""
    from lightning import LightningModule, Trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.network)

        def on_train_batch_end(self, *_: Any) -> None:
            clock.tick()

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    trainer.fit(Module(), DataLoader(data, BATCH, shuffle=True))


Loop = Callable[[TensorDataset, Clock, Path], None]

LOOPS: dict[str, Loop] = {
    "bare PyTorch": bare,
    "bare Accelerate": bare_accelerate,
    "roadwork_dist.Trainer": roadwork_dist,
    "transformers.Trainer": transformers_trainer,
    "lightning.Trainer": lightning,
}


Times = dict[str, list[float]]
"""Milliseconds per step of every loop, one value per turn."""


def measure(loops: dict[str, Loop], steps: int, turns: int) -> Times:
    """Run every loop in every turn; the order rotates from turn to turn."""
    data = synthetic_rows(steps + WARMUP_STEPS)
    times: Times = {name: [] for name in loops}
    names = list(loops)
    for turn in range(-1, turns):  # turn -1 imports and warms up
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            clock = Clock(steps)
            with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
                loops[name](data, clock, Path(folder))
            if turn >= 0:
                times[name].append(clock.ms)
    return times


def table(times: Times) -> str:
    """Markdown: time per step and added time of every loop, with interquartile ranges (IQR)."""
    first = times["bare PyTorch"]
    lines = [
        "| loop | ms a step | IQR | added ms | IQR | added ms, fastest turns | times bare |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, values in times.items():
        pairs = list(zip(values, first, strict=True))
        cells = [
            median_and_spread(values),
            median_and_spread([own - base for own, base in pairs], "+"),
            f"{min(values) - min(first):+.3f}",
            f"{statistics.median(own / base for own, base in pairs):.2f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, help="timed steps of a run (default 150)")
    parser.add_argument("--turns", type=int, default=40, help="runs of every loop (default 40)")
    parser.add_argument(
        "--loops", nargs="*", help="parts of the names of loops to run in addition to the bare one"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    loops = {n: f for n, f in LOOPS.items() if f is not lightning or find_spec("lightning")}
    if arguments.loops:
        loops = {n: f for n, f in loops.items() if f is bare or any(w in n for w in arguments.loops)}
    before = hardware()
    times = measure(loops, arguments.steps, arguments.turns)
    packages = ["torch", "accelerate", "transformers", *(["lightning"] if find_spec("lightning") else [])]
    print(f"{date.today()} · {' '.join(['python', *sys.argv])}")
    print(f"{before} at the start, {os.getloadavg()[0]:.1f} at the end")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    print(f"{arguments.turns} turns of {arguments.steps} steps\n")
    print(table(times))


if __name__ == "__main__":
    main()
