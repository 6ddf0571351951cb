"""Photos on a server that turn out to be unreadable during training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.file_server import FileServer, serve_copy
from support.photo_shards import data_config, write_photo_shards

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.experiment import LossConfig
from roadwork_dist.datasets.dataset import collate
from roadwork_dist.datasets.streamed import StreamedDataset
from roadwork_dist.detector.losses.composite import RoadworkLoss
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.photos.mask_images import decode_mask
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import ViewGeometry
from roadwork_dist.sources import load_manifest
from roadwork_dist.storage.remote.retry import ServerDownError
from roadwork_dist.trainer.feed.loader import load_batches

VIEWS = PhotoViews(ViewGeometry(32))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photo_shards(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def server(shards: Path, tmp_path: Path) -> Iterator[FileServer]:
    with serve_copy(shards, tmp_path) as running:
        yield running


@pytest.fixture
def manifest(server: FileServer, tmp_path: Path) -> Manifest:
    config = data_config(tmp_path / "cache", attempts=2, timeout=20.0)
    return load_manifest(f"{server.url}/shards", config, name="train")


def lose_first_tar(server: FileServer) -> None:
    min((server.folder / "shards").glob("*.tar")).unlink()


def test_rows_are_those_of_the_disk(manifest: Manifest, shards: Path, tmp_path: Path) -> None:
    rows = StreamedDataset(manifest, views=VIEWS, masks=True)
    local = load_manifest(str(shards), data_config(tmp_path), name="train")
    for row in (0, 1, 30):
        assert torch.equal(rows[row]["views"], VIEWS.plain(local[row].image))
        assert rows[row]["label"] == local[row].label
        mask = local[row].mask
        assert rows[row]["mask_known"] == (mask is not None)
        if mask is not None:
            assert torch.equal(rows[row]["mask"], decode_mask(mask))
    assert not rows.unreadable


def test_a_lost_photo_counts_for_nothing(
    server: FileServer, manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    lose_first_tar(server)
    rows = StreamedDataset(manifest, views=VIEWS, masks=True, max_share=0.5)
    loss = RoadworkLoss(LossConfig(), with_masks=True, with_experts=False)
    alone = loss.count_targets(collate([rows[1]]))
    assert alone == dict.fromkeys(alone, 0)
    batch = collate([rows[1], rows[40]])  # stacks with rows of other tars
    assert loss.count_targets(batch) == loss.count_targets(collate([rows[40]]))
    assert rows.unreadable == [1]
    assert "training without an unreadable photo" in caplog.text
    assert "404" in caplog.text


def test_too_many_lost_photos_stop_the_run(server: FileServer, manifest: Manifest) -> None:
    lose_first_tar(server)
    rows = StreamedDataset(manifest, views=VIEWS, max_share=0.05)  # 2.4 photos
    first, second, third = rows[0], rows[1], rows[1]
    assert first["label"] == second["label"] == third["label"] == -1
    with pytest.raises(
        DataError,
        match=r"3 photos are unreadable for one of 1 processes, expected at most 5.0% of 48 photos",
    ):
        rows[2]


def test_a_process_may_meet_more_than_its_part_by_chance(manifest: Manifest) -> None:
    rows = StreamedDataset(manifest, views=VIEWS, max_share=0.5, processes=4)
    assert rows.most_unreadable == pytest.approx(6 + 3 * 6**0.5)  # 24 of 48 photos, a quarter of them


def test_loader_processes_count_together(server: FileServer, manifest: Manifest) -> None:
    lose_first_tar(server)
    rows = StreamedDataset(manifest, views=VIEWS, max_share=0.5)
    for epoch in range(2):  # whose loader processes are others
        for _ in load_batches(rows, [[0, 1], [2, 40]], epoch=epoch, workers=2, collate=collate):
            pass
        assert rows.unreadable == [0, 1, 2]
    strict = StreamedDataset(manifest, views=VIEWS, max_share=2.5 / 48)
    with pytest.raises(DataError, match=r"3 photos are unreadable"):
        list(load_batches(strict, [[0], [1], [2], [40]], workers=2, collate=collate))


def test_a_server_that_is_down_stops_the_run_at_once(server: FileServer, manifest: Manifest) -> None:
    server.fault = lambda number, name: "503"
    rows = StreamedDataset(manifest, views=VIEWS, max_share=1.0)
    with pytest.raises(ServerDownError, match=r"the server answered 503 .*; tried 2 times"):
        rows[0]
    with pytest.raises(ServerDownError):  # known, not asked again
        rows[1]
