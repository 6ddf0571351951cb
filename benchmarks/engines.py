"""Time that the Trainer adds to a step of each engine's own loop, with two processes on CPUs.

The bare loops use the engines as documented and nothing else: torch's DistributedDataParallel, torch's
``fully_shard``, ``deepspeed.initialize``. Both loops train the same network on the same rows with AdamW and
clipping at 1.0; the Trainer also writes a line of JSON per step and keeps a moving average. They take turns
in the same two processes. Steps are timed on rank 0, which waits for the other rank in every step.

    python benchmarks/engines.py
"""

import argparse
import importlib
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from chaos import ENGINES
from measuring import heading, median_and_spread
from overhead import BATCH, WARMUP_STEPS, Clock, adamw, roadwork_dist, synthetic_rows
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

SHARDED = [name for name in ENGINES if name != "single"]

Step = Callable[[Tensor, Tensor], None]


def network() -> nn.Module:
    """64 → 256, two blocks of 256 → 256 that FSDP2 shards separately, 256 → 10."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(2)]
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), *blocks, nn.Linear(256, 10))


def torch_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """A step of a wrapped model."""

    def step(inputs: Tensor, labels: Tensor) -> None:
        F.cross_entropy(model(inputs), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare_ddp(engine: str) -> Step:
    """DistributedDataParallel."""
    model = nn.parallel.DistributedDataParallel(network())
    return torch_step(model, adamw(model))


def bare_fsdp2(engine: str) -> Step:
    """``fully_shard`` on each block and on the whole model."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    mesh = init_device_mesh("cpu", (2,))
    for block in (model[2], model[3]):  # type: ignore[index]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return torch_step(model, adamw(model))


def bare_zero(engine: str) -> Step:
    """``deepspeed.initialize``."""
    import deepspeed

    model = network()
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": int(engine[-1])},
    }
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=adamw(model), config=config)

    def step(inputs: Tensor, labels: Tensor) -> None:
        wrapped.backward(F.cross_entropy(wrapped(inputs), labels))
        wrapped.step()

    return step


BARE: dict[str, Callable[[str], Step]] = {"ddp": bare_ddp, "fsdp2": bare_fsdp2}


def bare(engine: str, data: TensorDataset, clock: Clock) -> None:
    """The engine's own loop."""
    step = BARE.get(engine, bare_zero)(engine)
    for inputs, labels in DataLoader(data, BATCH, shuffle=True):
        step(inputs, labels)
        clock.tick()


def trainer(data: TensorDataset, clock: Clock, folder: Path) -> None:
    """This package under the engine given by the environment."""
    doubled = TensorDataset(*(torch.cat([rows, rows]) for rows in data.tensors))  # two processes share it
    roadwork_dist(doubled, clock, folder, network)


def as_a_rank(engine: str, steps: int, turns: int) -> None:
    """Run both loops in turns; rank 0 prints their milliseconds per step as JSON."""
    from roadwork_dist.trainer.engine.accelerator import build_accelerator
    from roadwork_dist.trainer.engine.collectives import broadcast_object

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    accelerator = build_accelerator(device="cpu")
    if engine.startswith("zero"):
        importlib.import_module("deepspeed").init_distributed("gloo")
    data = synthetic_rows(steps + WARMUP_STEPS)
    times: dict[str, list[float]] = {"bare": [], "Trainer": []}
    for turn in range(-1, turns):
        for name in list(times)[:: 1 if turn % 2 else -1]:
            clock = Clock(steps)
            with tempfile.TemporaryDirectory() as own, redirect_stdout(io.StringIO()):
                folder = Path(broadcast_object(own))  # every rank writes below rank 0's folder
                bare(engine, data, clock) if name == "bare" else trainer(data, clock, folder)
                accelerator.wait_for_everyone()
            if turn >= 0:
                times[name].append(clock.ms)
    if accelerator.is_main_process:
        print(json.dumps(times))


def measure(engine: str, steps: int, turns: int) -> dict[str, list[float]]:
    """Start two processes of an engine and return the times of rank 0.

    Raises:
        SystemExit: the processes fail.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += [__file__, "--as-rank", engine, "--steps", str(steps), "--turns", str(turns)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENGINES[engine])
    if done.returncode:
        raise SystemExit(f"{engine} failed (exit code {done.returncode}):\n{done.stderr[-4000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def row(engine: str, times: dict[str, list[float]]) -> str:
    """A row of the table."""
    pairs = list(zip(times["Trainer"], times["bare"], strict=True))
    cells = [
        median_and_spread(times["bare"]),
        median_and_spread(times["Trainer"]),
        median_and_spread([own - base for own, base in pairs], "+"),
        f"{statistics.median(own / base for own, base in pairs):.2f}",
    ]
    return f"| {engine} | {' | '.join(cells)} |"


def main(words: list[str] | None = None) -> int:
    """Measure every engine and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", default=",".join(SHARDED), help=f"of {', '.join(SHARDED)}")
    parser.add_argument("--steps", type=int, default=100, help="timed steps of a run (default 100)")
    parser.add_argument("--turns", type=int, default=12, help="runs of each loop (default 12)")
    parser.add_argument("--as-rank", choices=SHARDED, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.as_rank:
        as_a_rank(options.as_rank, options.steps, options.turns)
        return 0
    print(heading("accelerate", "deepspeed"))
    print("| engine | bare ms a step | IQR | Trainer ms a step | IQR | added ms | IQR | times bare |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for engine in options.engines.split(","):
        print(row(engine, measure(engine, options.steps, options.turns)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
