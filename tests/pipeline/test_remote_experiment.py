"""The detector, trained on photos from a server: the same figures as from the disk."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.file_server import serve
from support.tiny_run import tiny_arguments, tiny_set

from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.config.io import parse_experiment
from roadwork_dist.datasets.streamed import StreamedDataset
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.recipes import data as build_data
from roadwork_dist.recipes.pretrain import run_experiment
from roadwork_dist.sources import load_manifest
from roadwork_dist.storage.shards.plan import ShardOptions
from roadwork_dist.storage.shards.write import write_shards


@pytest.mark.parametrize("mode", ["online", "cached"])
def test_a_detector_from_a_server_is_that_from_the_disk(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = []

    class Watched(StreamedDataset):
        def __init__(self, manifest: Manifest, **arguments: Any) -> None:
            super().__init__(manifest, **arguments)
            streamed.append(manifest.name)

    monkeypatch.setattr(build_data, "StreamedDataset", Watched)
    data = tiny_set(tmp_path / "photos")
    for name in ("train", "val"):
        manifest = load_manifest(str(getattr(data, name)), DataConfig(), name=name)
        write_shards(manifest, tmp_path / "served" / name, ShardOptions(size=30_000))
    assert len(list((tmp_path / "served" / "train").glob("*.tar"))) > 2
    told = []
    with serve(tmp_path / "served") as server:
        for place in (str(tmp_path / "served"), server.url):
            folder = tmp_path / f"run {len(told)}"
            arguments = [
                *tiny_arguments(data, folder),
                *(f"--data.train={place}/train", f"--data.val={place}/val", "--data.order=shards"),
                *(f"--data.remote.cache_dir={tmp_path / 'cache'}", f"--features.mode={mode}"),
                *("--augment.mix=mixup", "--eval.report=false", "--views.size=64"),
            ]
            run_experiment(parse_experiment(arguments))
            lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
            losses = [json.loads(line).get("loss") for line in lines]
            told.append((losses, json.loads((folder / "run" / "evaluation.json").read_text())["val"]))
    assert server.sent() > 0
    # Training photos that are read again in each epoch are not all checked in advance.
    assert streamed == ([f"{server.url}/train"] if mode == "online" else [])
    assert told[0] == told[1]
