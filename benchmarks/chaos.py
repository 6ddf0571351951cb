"""Repeatedly kills training runs at random moments and compares their results with an undisturbed run.

A small model with everything that makes resuming hard (dropout, augmentation in a loader process,
accumulation, an average, validation) trains in real processes. At a random moment of each start one
rank, all ranks, or their launcher is killed with SIGKILL, or one rank or all are asked to stop (SIGTERM,
SIGUSR1); then the run is started again. When a run ends, its metrics and weights must be bit-identical to
those of the undisturbed run, and the next run begins.

    python benchmarks/chaos.py --engine single,ddp --kills 30
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

ENGINES: dict[str, dict[str, str]] = {
    "single": {},
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},
    **{
        f"zero{stage}": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
        for stage in (1, 2, 3)
    },
}
"""Environment variables that select the engine, as set by ``accelerate launch``."""
ATTACKS = ("kill one rank", "kill all ranks", "kill the launcher", "SIGTERM to all", "SIGUSR1 to one rank")
LINGER_S = 60.0
"""Seconds after an attack; processes that still run then have outlived it."""
COMPARED = ("train", "skip", "val")
TIMINGS = ("samples_per_s", "data_wait", "memory_mb")


def train(run_dir: Path, steps: int, pause: float) -> None:
    """One rank of a run; at the end rank 0 writes ``end.json`` with a digest of weights and average."""
    import torch
    from torch import Tensor, nn

    from roadwork_dist.trainer.config import (
        CheckpointConfig,
        EmaConfig,
        OptimConfig,
        TrackingConfig,
        TrainConfig,
    )
    from roadwork_dist.trainer.trainer import Trainer

    torch.set_num_threads(1)

    class Noisy:
        """Random rows with noise from torch's global generator; reading is slowed down."""

        def __init__(self, rows: int) -> None:
            generator = torch.Generator().manual_seed(1)
            self.inputs = torch.randn(rows, 6, generator=generator)

        def __len__(self) -> int:
            return len(self.inputs)

        def __getitem__(self, row: int) -> tuple[Tensor, int]:
            time.sleep(pause / 8)
            inputs = self.inputs[row]
            return inputs + 0.1 * torch.randn(6), int(inputs[:2].sum() > 0)

    torch.manual_seed(7)
    blocks = [
        nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.3)) for _ in range(2)
    ]
    config = TrainConfig(
        output_dir=str(run_dir),
        epochs=2,
        batch_size=8 // int(os.environ.get("WORLD_SIZE", "1")),
        accumulation=2,
        workers=1,
        device="cpu",
        optim=OptimConfig(lr=0.01),
        ema=EmaConfig(decay=0.9),
        checkpoint=CheckpointConfig(every_steps=4),
        tracking=TrackingConfig(progress=False),
        hang_timeout=30.0,
    )
    model = nn.Sequential(nn.Linear(6, 32), *blocks, nn.Linear(32, 2))
    trainer = Trainer(model, config, Noisy(16 * (steps // 2)), Noisy(16)).fit()
    digest = hashlib.sha256()
    for swap in (trainer.averaged(), None):
        if swap is not None:
            swap.__enter__()
        for name, tensor in sorted(trainer.engine.whole_state().items()):
            digest.update(name.encode() + tensor.float().numpy().tobytes())
        if swap is not None:
            swap.__exit__(None, None, None)
    if trainer.accelerator.is_main_process:
        (run_dir / "end.json").write_text(json.dumps({"sha256": digest.hexdigest()}))


@dataclass
class Start:
    """The processes of one start of a run: a launcher and its ranks."""

    launcher: psutil.Popen
    output: Path

    def ranks(self) -> list[psutil.Process]:
        """The training processes that have been started so far."""
        try:
            found = self.launcher.children() if self.launcher.is_running() else []
        except psutil.NoSuchProcess:
            return []
        return [each for each in found if each.is_running()]

    def everybody(self) -> list[psutil.Process]:
        """Launcher, ranks and their loader processes."""
        try:
            return [self.launcher, *self.launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


@dataclass
class Tally:
    """Counts for one engine."""

    attacks: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    runs: int = 0
    unequal: list[str] = field(default_factory=list)
    lingered: float = 0.0
    outlived: int = 0


class Chaos:
    """Attacks the runs of one engine."""

    def __init__(self, engine: str, options: argparse.Namespace, folder: Path) -> None:
        self.engine, self.options, self.folder = engine, options, folder
        self.processes = 1 if engine == "single" else options.processes
        self.random = random.Random(f"{options.seed} {engine}")
        self.tally = Tally()
        self.whole = 0.0

    def start(self, run_dir: Path) -> Start:
        """Start all ranks below one launcher."""
        self.tally.starts += 1
        script = [str(Path(__file__).resolve()), "--train", str(run_dir)]
        script += ["--steps", str(self.options.steps), "--pause", str(self.options.pause)]
        if self.processes == 1:
            kind = ["--num_processes", "1"]
        else:
            kind = ["--multi_gpu", "--num_processes", str(self.processes)]
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *kind]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", str(_free_port()), "--num_cpu_threads_per_process", "1"]
        output = self.folder / f"{self.engine}-start-{self.tally.starts}.log"
        # How long torchrun waits for ranks that do not end: with one dead, others wait in a collective.
        environment = os.environ | ENGINES[self.engine] | {"PET_SHUTDOWN_TIMEOUT": "5"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]])
        with output.open("wb") as file:
            process = psutil.Popen([*launch, *script], stdout=file, stderr=file, env=environment)
        return Start(process, output)

    def run(self) -> Tally:
        """All attacks on this engine."""
        undisturbed = self.folder / f"{self.engine}-undisturbed"
        started = time.monotonic()
        self.finish(undisturbed)
        self.whole = time.monotonic() - started
        expected, number = outcome(undisturbed), 0
        while sum(self.tally.attacks.values()) < self.options.kills or self.tally.runs == 0:
            number += 1
            run_dir = self.folder / f"{self.engine}-{number}"
            while not (run_dir / "end.json").exists():
                if sum(self.tally.attacks.values()) < self.options.kills:
                    self.attack(run_dir)
                else:
                    self.finish(run_dir)
            self.tally.runs += 1
            if (got := outcome(run_dir)) != expected:
                self.tally.unequal.append(f"{run_dir.name}: {difference(expected, got)}")
            else:
                shutil.rmtree(run_dir)
        return self.tally

    def finish(self, run_dir: Path) -> None:
        """Start a run and wait for its end.

        Raises:
            SystemExit: the run fails.
        """
        start = self.start(run_dir)
        if (code := start.launcher.wait()) != 0:
            text = start.output.read_text()[-4000:]
            raise SystemExit(f"an undisturbed start failed (exit code {code}):\n{text}")

    def attack(self, run_dir: Path) -> None:
        """Start a run and attack it at a random moment, including start-up."""
        is_fresh, started = not run_dir.exists(), time.monotonic()
        start = self.start(run_dir)
        try:
            start.launcher.wait(self.random.uniform(0.2, 1.0) * self.whole)
            if is_fresh:  # the machine is less busy than when this was first measured
                self.whole = min(self.whole, time.monotonic() - started)
        except psutil.TimeoutExpired:
            name = self.random.choice(ATTACKS)
            everybody, ranks = start.everybody(), start.ranks()
            targets = [start.launcher] if "launcher" in name or not ranks else ranks
            if "one" in name:
                targets = [self.random.choice(targets)]
            number = signal.SIGKILL if "kill" in name else getattr(signal, name.split()[0])
            for target in targets:
                _send(target, number)
            self.tally.attacks[name] += 1
            self.wait_for_the_end(everybody)

    def wait_for_the_end(self, everybody: list[psutil.Process]) -> None:
        """Measure how long processes outlive an attack; kill those that do not end."""
        started = time.monotonic()
        _, alive = psutil.wait_procs(everybody, timeout=LINGER_S)
        self.tally.lingered = max(self.tally.lingered, time.monotonic() - started)
        self.tally.outlived += len(alive)
        for process in alive:
            _send(process, signal.SIGKILL)


def outcome(run_dir: Path) -> dict[str, Any]:
    """What is compared: each line of metrics without its times, and the digest of the weights."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figures = [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in lines
        if line["kind"] in COMPARED
    ]
    return {"metrics": figures, "weights": json.loads((run_dir / "end.json").read_text())["sha256"]}


def difference(expected: dict[str, Any], got: dict[str, Any]) -> str:
    """Describe the first difference: a line of metrics, or the weights."""
    lines = zip(expected["metrics"], got["metrics"], strict=False)
    for one, other in lines:
        if one != other:
            return f"{one} is {other}"
    if len(expected["metrics"]) != len(got["metrics"]):
        return f"{len(got['metrics'])} lines, expected {len(expected['metrics'])}"
    return "the weights differ"


def table(tallies: dict[str, Tally]) -> str:
    """A row per engine."""
    heads = ["engine", "starts", *ATTACKS, "runs that ended", "equal to the bit", "longest end s", "outlived"]
    rows = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for engine, tally in tallies.items():
        equal = tally.runs - len(tally.unequal)
        cells = [engine, tally.starts, *(tally.attacks[name] for name in ATTACKS), tally.runs, equal]
        rows.append("| " + " | ".join(map(str, [*cells, f"{tally.lingered:.1f}", tally.outlived])) + " |")
    return "\n".join(rows)


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", default="single,ddp", help=f"comma-separated, of {', '.join(ENGINES)}")
    parser.add_argument("--kills", type=int, default=30, help="attacks per engine")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of a run")
    parser.add_argument("--pause", type=float, default=0.1, help="minimum seconds of reading a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Attack every engine and print the table.

    Returns:
        0; 1 if a run differs from the undisturbed one, or a process outlived its attack; as a rank, 75 if
        it was asked to stop.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(words)
    if options.train is not None:
        from roadwork_dist.common.errors import InterruptedRunError

        try:
            train(options.train, options.steps, options.pause)
        except InterruptedRunError as error:
            print(error, file=sys.stderr)
            return 75
        return 0
    names = options.engine.split(",")
    if unknown := set(names) - set(ENGINES):
        print(f"unknown engine {', '.join(unknown)}: choose of {', '.join(ENGINES)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        tallies: dict[str, Tally] = {}
        for name in names:
            tallies[name] = Chaos(name, options, Path(folder)).run()
            print(f"{name}: {tallies[name]}", file=sys.stderr, flush=True)
    print(f"{date.today()} · {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print(f"torch {version('torch')}, accelerate {version('accelerate')} · seed {options.seed}")
    print(f"`python benchmarks/chaos.py {' '.join(words)}`\n")
    print(table(tallies))
    failed = [line for tally in tallies.values() for line in tally.unequal]
    print("\n".join(failed))
    return 1 if failed or any(tally.outlived for tally in tallies.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
