"""Parquet of the NATIX set's shape on a server: read by row groups, as rows of the same file on disk."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from support.file_server import FileServer, serve
from support.toy import toy_config

from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.config.experiment import ColumnsConfig, DataConfig, RemoteConfig
from roadwork_dist.sources import load_manifest, remote_parquet
from roadwork_dist.sources.shard_order import shard_order_of
from roadwork_dist.trainer.trainer import Trainer

ROWS, GROUP = 30, 7


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    """Two files with the columns image, label and scene_description."""
    folder = tmp_path / "served"
    folder.mkdir()
    for part in (0, 1):
        numbers = range(part * ROWS, (part + 1) * ROWS)
        cells = [{"bytes": picture(number), "path": f"{number}.jpg"} for number in numbers]
        if part:
            cells[3] = {"bytes": None, "path": "lost.jpg"}
        table = pa.table(
            {
                "image": pa.array(cells),
                "label": [number % 2 for number in numbers],
                "scene_description": [f"scene {number}" if number % 3 else None for number in numbers],
            }
        )
        parquet.write_table(table, folder / f"train-{part}.parquet", row_group_size=GROUP)
    with serve(folder) as running:
        yield running


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    remote = RemoteConfig(cache_dir=str(tmp_path / "cache"), attempts=3, timeout=20.0, read_ahead=1)
    return DataConfig(columns=ColumnsConfig(description="scene_description"), remote=remote)


def streamed(server: FileServer, config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> object:
    """As the hub would list the files."""
    urls = [f"{server.url}/train-{part}.parquet" for part in (0, 1)]
    monkeypatch.setattr(remote_parquet, "hub_files", lambda repository, split, source: urls)
    return load_manifest("hf:natix/roadwork:train?streaming", config, name="train")


def test_a_stream_has_the_rows_of_the_file(server: FileServer, config: DataConfig) -> None:
    there = load_manifest(f"{server.url}/train-0.parquet", config, name="train")
    size = (server.folder / "train-0.parquet").stat().st_size
    begun = server.sent(".parquet")
    assert begun < 64 * 1024 + 5000 < size / 2  # footer (pyarrow looks for it in 64 KiB), labels and texts
    here = load_manifest(str(server.folder / "train-0.parquet"), config, name="train")
    assert len(there) == len(here) == ROWS
    for own, other in zip(there, here, strict=True):
        assert (own.label, own.description) == (other.label, other.description)
        assert own.image.read() == other.image.read()
    assert server.sent(".parquet") - begun <= size  # each row group once


def test_names_of_classes_are_those_of_the_file(server: FileServer, config: DataConfig) -> None:
    path = server.folder / "train-0.parquet"
    table = parquet.read_table(path).append_column("weather", pa.array([0, 1] * (ROWS // 2)))
    for names in (["None", "Roadwork"], ["Roadwork", "None"]):
        features = datasets.Features.from_arrow_schema(table.schema)
        features["label"] = datasets.ClassLabel(names=names)
        features["weather"] = datasets.ClassLabel(names=["sunny", "rainy"])
        parquet.write_table(table.cast(features.arrow_schema), path)
        if names[1] == "Roadwork":
            manifest = load_manifest(f"{server.url}/train-0.parquet", config, name="train")
            assert [sample.weather for sample in manifest] == ["sunny", "rainy"] * (ROWS // 2)
        else:
            with pytest.raises(
                DataError, match="has 0 = 'Roadwork', 1 = 'None', expected 1 to mean roadwork"
            ):
                load_manifest(f"{server.url}/train-0.parquet", config, name="train")


def test_a_row_costs_its_row_group(
    server: FileServer, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = streamed(server, config, monkeypatch)
    assert len(manifest) == 2 * ROWS  # type: ignore[arg-type]
    server.asked.clear()
    assert manifest[ROWS + 10].image.read() == picture(ROWS + 10)  # type: ignore[index]
    assert manifest[ROWS + 12].image.read() == picture(ROWS + 12)  # type: ignore[index]
    assert [name for name, *_ in server.asked] == ["train-1.parquet"]
    assert server.sent(".parquet") < (server.folder / "train-1.parquet").stat().st_size / 3
    with pytest.raises(DataError, match=r"train-1.parquet, row group 0, row 4, image: holds no image"):
        manifest[ROWS + 3].image.read()  # type: ignore[index]


def test_the_order_keeps_to_row_groups(
    server: FileServer, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = streamed(server, config, monkeypatch)
    order = shard_order_of([sample.image for sample in manifest], config)  # type: ignore[attr-defined]
    assert order is not None
    groups = -(-ROWS // GROUP)
    assert len(set(order.shards.tolist())) == 2 * groups


def test_faults_are_mended_or_told(server: FileServer, config: DataConfig) -> None:
    kinds = ("500", "short", "reset", "429")
    server.fault = lambda number, name: kinds[number // 5 % 4] if number % 5 == 1 else ""
    manifest = load_manifest(f"{server.url}/train-0.parquet", config, name="train")
    assert [hashlib.sha256(s.image.read()).digest() for s in manifest] == [
        hashlib.sha256(picture(number)).digest() for number in range(ROWS)
    ]
    server.fault = lambda number, name: "503"
    with pytest.raises(DataError, match=r"train-1.parquet: cannot be fetched .*503 .*; tried 3 times"):
        load_manifest(f"{server.url}/train-1.parquet", config, name="train")


def test_what_cannot_be_streamed_is_told(
    server: FileServer, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        DataError, match=r"is not a hub id with a split, expected hf:owner/name:split.streaming"
    ):
        load_manifest("hf:natix?streaming", config, name="train")
    with pytest.raises(DataError, match="the hub cannot be reached, expected access for streaming"):
        load_manifest("hf:natix/roadwork:train?streaming", config, name="train")  # HF_HUB_OFFLINE
    monkeypatch.setattr(remote_parquet, "hub_files", lambda *_: ["hf://datasets/a/b/photos.zip"])
    with pytest.raises(DataError, match="not consist of Parquet files, expected them for streaming: remove"):
        load_manifest("hf:natix/roadwork:train?streaming", config, name="train")
    (server.folder / "no.parquet").write_bytes(b"x" * 1000)
    with pytest.raises(DataError, match=r"no.parquet: cannot be read .*expected a Parquet file"):
        load_manifest(f"{server.url}/no.parquet", config, name="train")
    masks = replace(config, columns=ColumnsConfig(mask="scene_description", description=None))
    with pytest.raises(DataError, match=r"has masks .column 'scene_description'., which are not read"):
        load_manifest(f"{server.url}/train-0.parquet", masks, name="train")
    server.knows_ranges = False
    with pytest.raises(DataError, match="the server does not support range requests"):
        load_manifest(f"{server.url}/train-0.parquet", config, name="train")


def test_the_files_of_a_split_are_found(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_parquet, "hub_reachable", lambda: True)
    # A folder is resolved as a repository of the hub is, down to the names of splits.
    found = remote_parquet.hub_files(str(server.folder), "train", "hf:…")
    assert [Path(each).name for each in found] == ["train-0.parquet", "train-1.parquet"]
    with pytest.raises(DataError, match=r"hf:…: cannot be opened .*'test'.*hub with that split"):
        remote_parquet.hub_files(str(server.folder), "test", "hf:…")


def test_a_stream_of_hugging_face_is_refused_with_the_way_out(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"x": [[1.0]], "y": [0]}).to_iterable_dataset()
    with pytest.raises(
        ConfigError, match=r"train_data is of type IterableDataset.*hf:owner/name:split\?streaming"
    ):
        Trainer(torch.nn.Linear(1, 2), toy_config(tmp_path), rows)  # type: ignore[arg-type]
