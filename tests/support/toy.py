"""A small model and data set with everything that makes resuming hard."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from roadwork_dist.trainer.checkpoint.tensors import StoredTensors
from roadwork_dist.trainer.config import CheckpointConfig, EmaConfig, OptimConfig, ScheduleConfig, TrainConfig
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.trainer import Trainer

TIMINGS = (
    *("samples_per_s", "samples_per_s_per_rank", "data_wait", "steps", "step_s_p50", "step_s_p95"),
    *("memory_mb", "memory_allocated_mb", "memory_reserved_mb", "memory_peak_mb"),
    *("backbone_tflops", "backbone_mfu", "slowest_rank", "slowest_host", "slowest_share", "slowest_cause"),
)
"""Figures of ``metrics.jsonl`` that depend on the clock, or on where a run was interrupted."""
CLOCKED = ("health", "checkpoint")
"""Kinds of lines that hold nothing else."""


def toy_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 2))


def toy_data(rows: int, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, :2].sum(1) > 0).long())


class NoisyData:
    """Augments with the global generators of torch, numpy and Python, as many data sets do."""

    def __init__(self, rows: int) -> None:
        self.base = toy_data(rows)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, label = self.base[index]
        noise = torch.randn(6) * 0.1 + float(np.random.rand()) * 0.1 + random.random() * 0.1
        return inputs + noise, label


def toy_config(run_dir: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "output_dir": str(run_dir),
        "epochs": 2,
        "batch_size": 16,
        "device": "cpu",
        "optim": OptimConfig(lr=0.01),
        "schedule": ScheduleConfig(warmup_steps=3),
        "ema": EmaConfig(decay=0.9),
        "checkpoint": CheckpointConfig(every_steps=2),
    }
    return TrainConfig(**(settings | changes))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what depends on the clock."""
    told = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in TIMINGS}
        for line in told
        if line["kind"] not in CLOCKED
    ]


def stored(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    source = StoredTensors(checkpoint)
    return {name: source.whole(name) for name in source.shapes}


def newest_tensors(run_dir: Path) -> dict[str, Tensor]:
    """Weights, moments and averages of the newest checkpoint, and the best weights."""
    newest = max(path for path in (run_dir / "checkpoints").glob("step-*") if path.suffix == "")
    best = run_dir.glob("best/*.safetensors")
    tensors = {f"{newest.name}/{name}": tensor for name, tensor in stored(newest).items()}
    return tensors | {f"best/{path.name}/{n}": t for path in best for n, t in load_file(path).items()}


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"not bit-identical: {different}"


class Stop(Exception):
    """Ends training like a crash does."""


class StopAt(Callback):
    """Raises behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step == self.step:
            raise Stop
