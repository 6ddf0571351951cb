"""Training from a server: to the bit what it is from the disk, whatever the server does."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ranks
from support.file_server import FileServer, serve
from support.photo_shards import data_config, train_on, write_photo_shards
from support.toy import assert_same_tensors, lines, newest_tensors

from roadwork_dist.sources import load_manifest
from roadwork_dist.sources.shard_order import shard_order_of
from roadwork_dist.trainer.feed.sampler import Sampler


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photo_shards(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def local_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, from the disk, never interrupted."""
    folder = tmp_path_factory.mktemp("local")
    ranks.run(train_on, str(shards), folder / "run", data_config(folder / "cache"), world_size=2)
    return folder / "run"


@pytest.fixture
def server(shards: Path, tmp_path: Path) -> Iterator[FileServer]:
    folder = Path(shutil.copytree(shards, tmp_path / "served" / "shards"))
    with serve(folder.parent) as running:
        yield running


def assert_same_runs(first: Path, second: Path) -> None:
    assert_same_tensors(newest_tensors(first), newest_tensors(second))
    assert lines(first) == lines(second)


def test_a_faulty_server_gives_the_losses_of_the_disk(
    server: FileServer, local_run: Path, tmp_path: Path
) -> None:
    faults = random.Random(1)
    kinds = ("500", "429", "short", "reset", "flip")
    server.fault = lambda number, name: faults.choice(kinds) if faults.random() < 0.3 else ""
    source, data = f"{server.url}/shards", data_config(tmp_path / "cache")
    ranks.run(train_on, source, tmp_path / "run", data, 1, world_size=2)
    assert_same_runs(tmp_path / "run", local_run)


def test_the_processes_of_a_machine_fetch_a_shard_once(server: FileServer, tmp_path: Path) -> None:
    data = data_config(tmp_path / "cache")
    ranks.run(train_on, f"{server.url}/shards", tmp_path / "run", data, 1, world_size=2)
    sizes = {f"shards/{path.name}": path.stat().st_size for path in server.folder.glob("*/*.tar")}
    whole = [name for name, start, size in server.asked if size == sizes.get(name)]
    assert sorted(whole) == sorted(sizes)
    assert server.sent() <= sum(sizes.values()) * (
        1 + 4 / 16
    )  # two ranks, a loader each, read a few by range


def test_a_killed_run_goes_on_without_reading_what_was_passed(
    server: FileServer, shards: Path, local_run: Path, tmp_path: Path
) -> None:
    source = f"{server.url}/shards"
    data = data_config(tmp_path / "cache", read_ahead=1)
    ends = ranks.spawn(train_on, source, tmp_path / "run", data, 0, 5, world_size=2)
    assert -9 in [end.code for end in ends]
    server.asked.clear()
    elsewhere = data_config(tmp_path / "cache of another machine", read_ahead=1)
    # On one process, of twice the batch: the rows of each step and the lanes stay.
    ranks.run(train_on, source, tmp_path / "run", elsewhere, 0, 0, 6)
    manifest = load_manifest(str(shards), data, name="train")
    order = shard_order_of([sample.image for sample in manifest], data)
    assert order is not None
    weights = [1.0 + row % 3 for row in range(48)]
    sampler = Sampler(48, 3, world_size=2, seed=42, weights=weights, shard_order=order)
    rest = order.shards[sampler.order(0)[4 * 6 :]].tolist()
    first_read = list(dict.fromkeys(int(name[-10:-4]) for name, *_ in server.asked if name.endswith(".tar")))
    assert set(first_read[: len(set(rest))]) == set(rest)
    assert len(set(rest)) < len(set(order.shards.tolist()))  # else this shows nothing


def test_resumed_on_as_many_processes_it_is_the_same_run(
    server: FileServer, local_run: Path, tmp_path: Path
) -> None:
    source, data = f"{server.url}/shards", data_config(tmp_path / "cache")
    ranks.spawn(train_on, source, tmp_path / "run", data, 0, 5, world_size=2)
    ranks.run(train_on, source, tmp_path / "run", data, world_size=2)
    assert_same_tensors(newest_tensors(tmp_path / "run"), newest_tensors(local_run))


def test_a_server_that_dies_ends_the_run_with_what_it_said(server: FileServer, tmp_path: Path) -> None:
    server.fault = lambda number, name: "500" if number > 8 else ""
    source = f"{server.url}/shards"
    data = data_config(tmp_path / "cache", attempts=2, timeout=20.0)
    ends = ranks.spawn(train_on, source, tmp_path / "run", data, world_size=2, timeout=60)
    assert all(end.code for end in ends)
    told = "".join(end.error for end in ends)
    assert "cannot be fetched (the server answered 500 Internal Server Error; tried 2 times in " in told
