"""A small shard set of noise, rows of it for a toy model, and a run over them."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from support.toy import toy_config

from roadwork_dist.config.experiment import DataConfig, RemoteConfig
from roadwork_dist.photos.images import decode
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.sources import load_manifest
from roadwork_dist.sources.shard_order import shard_order_of
from roadwork_dist.storage.remote.read_ahead import read_ahead_of
from roadwork_dist.storage.shards.plan import ShardOptions
from roadwork_dist.storage.shards.write import write_shards
from roadwork_dist.trainer.config import CheckpointConfig
from roadwork_dist.trainer.events.callback import Callback
from roadwork_dist.trainer.trainer import Trainer


def write_photo_shards(folder: Path, photos: int = 48, size: int = 70_000) -> Path:
    """Noise of 64x64 px, five photos a tar; every third is darker and labelled 1, every fourth has a mask."""
    loose = folder / "loose"
    loose.mkdir(parents=True)
    generator = np.random.default_rng(0)
    with (loose / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "label", "mask", "weather"])
        for number in range(photos):
            dark = number % 3 == 0
            pixels = generator.integers(0, 128 if dark else 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(loose / f"{number}.png")
            mask = ""
            if number % 4 == 0:
                mask = f"mask-{number}.png"
                Image.fromarray(generator.integers(0, 64, (64, 64), dtype=np.uint8)).save(loose / mask)
            table.writerow([f"photo-{number}", f"{number}.png", int(dark), mask, "rainy"])
    manifest = load_manifest(str(loose / "table.csv"), DataConfig(), name="train")
    write_shards(manifest, folder / "shards", ShardOptions(size=size))
    return folder / "shards"


def data_config(cache: Path, **changes: Any) -> DataConfig:
    return DataConfig(order="shards", shuffle_shards=2, remote=RemoteConfig(cache_dir=str(cache), **changes))


class PhotoRows:
    """Means and deviations of a photo's corners, and its label."""

    pure = True

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def __len__(self) -> int:
        return len(self.manifest)

    def sample_id(self, row: int) -> str:
        return self.manifest[row].id

    def read_ahead(self, batches: Iterable[list[int]]) -> Iterable[list[int]]:
        return read_ahead_of([sample.image for sample in self.manifest], batches)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        pixels = decode(self.manifest[row].image).float() / 255
        corner = pixels[:, :8, :8].flatten(1)
        return torch.cat([corner.mean(1), corner.std(1)]), int(self.manifest[row].label or 0)


class KillAt(Callback):
    """Kills the process behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Any, result: Any) -> None:
        if run.state.step == self.step:
            os.kill(os.getpid(), 9)


def train_on(
    source: str,
    run_dir: Path,
    data: DataConfig,
    workers: int = 0,
    kill_at: int = 0,
    batch_size: int = 3,
) -> int:
    """A run over a source on this rank; how many batches it read."""
    manifest = load_manifest(source, data, name="train")
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    config = toy_config(
        run_dir,
        batch_size=batch_size,
        workers=workers,
        checkpoint=CheckpointConfig(every_steps=2),
        monitor="-loss",
    )
    rows = PhotoRows(manifest)
    weights = [1.0 + row % 3 for row in range(len(rows))]
    trainer = Trainer(
        model,
        config,
        rows,
        rows,
        sample_weights=weights,
        shard_order=shard_order_of([sample.image for sample in manifest], data),
        callbacks=[KillAt(kill_at)] if kill_at else [],
    )
    trainer.fit()
    return trainer.batches_read
