"""Shard sets on a server as a source."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.file_server import FileServer, serve_copy
from support.photo_shards import data_config, write_photo_shards

from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.config.io import parse_experiment
from roadwork_dist.photos.check import check_images
from roadwork_dist.photos.images import decode
from roadwork_dist.photos.mask_images import decode_mask
from roadwork_dist.recipes.check import check_source
from roadwork_dist.sources import load_manifest
from roadwork_dist.sources.shard_order import shard_order_of
from roadwork_dist.storage.remote import image as remote_image


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photo_shards(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def server(shards: Path, tmp_path: Path) -> Iterator[FileServer]:
    with serve_copy(shards, tmp_path) as running:
        yield running


def quick(cache: Path) -> DataConfig:
    return data_config(cache, attempts=2, timeout=20.0)


def test_a_url_gives_the_samples_of_the_folder(server: FileServer, shards: Path, tmp_path: Path) -> None:
    config = quick(tmp_path / "cache")
    here = load_manifest(str(shards), config, name="train")
    for url in (f"{server.url}/shards", f"{server.url}/shards/", f"{server.url}/shards/shards.json"):
        there = load_manifest(url, config, name="train")
        assert there.ids == here.ids
        assert server.sent() == 0  # the index tells all but the pixels
    for own, other in zip(there, here, strict=True):
        assert replace(own, image=other.image, mask=other.mask) == other
        assert own.image.read() == other.image.read()
        assert (decode(own.image) == decode(other.image)).all()
        assert own.image.content_hash == other.image.content_hash  # type: ignore[attr-defined]
        assert (own.mask is None) == (other.mask is None)
        if own.mask is not None and other.mask is not None:
            assert (decode_mask(own.mask) == decode_mask(other.mask)).all()
    assert server.sent() <= sum(path.stat().st_size for path in shards.glob("*.tar")) * 17 / 16
    assert server.sent(".parquet") == (shards / "index.parquet").stat().st_size  # once


def test_a_missing_and_a_damaged_tar_are_counted_by_their_photos(server: FileServer, tmp_path: Path) -> None:
    tars = sorted((server.folder / "shards").glob("*.tar"))
    tars[1].unlink()
    content = bytearray(tars[2].read_bytes())
    content[len(content) // 2] ^= 1
    tars[2].write_bytes(content)
    tars[3].write_bytes(tars[3].read_bytes()[:-5000])
    manifest = load_manifest(f"{server.url}/shards", quick(tmp_path / "cache"), name="train")
    with pytest.raises(DataError, match=r"photos \(\d+\.\d%\) are unreadable, expected at most 1.0%.*404"):
        check_images(manifest)
    report = check_images(manifest, max_share=0.5)
    lost = {int(str(path.stem)[-6:]) for path in (tars[1], tars[2], tars[3])}
    of_tar = [int(str(sample.image.location)[-10:-4]) for sample in manifest]  # type: ignore[attr-defined]
    lost_ids = {id_ for id_, tar in zip(manifest.ids, of_tar, strict=True) if tar in lost}
    assert {name for name, _ in report.unreadable} <= lost_ids
    told = dict(report.unreadable)
    assert sum("answered 404" in reason for reason in told.values()) == of_tar.count(1)
    assert sum("shards.json says" in reason for reason in told.values()) >= 2


def test_a_shard_that_rots_in_the_cache_is_fetched_again(server: FileServer, tmp_path: Path) -> None:
    manifest = load_manifest(f"{server.url}/shards", quick(tmp_path / "cache"), name="train")
    photos = [sample.image.read() for sample in manifest]
    for path in (tmp_path / "cache").glob("*.data"):
        path.write_bytes(bytes(path.stat().st_size))
    before = server.sent()
    assert [sample.image.read() for sample in manifest] == photos
    assert server.sent() - before == sum(path.stat().st_size for path in server.folder.glob("*/*.tar"))


def test_data_check_reads_a_url(server: FileServer, tmp_path: Path) -> None:
    min((server.folder / "shards").glob("*.tar")).unlink()
    config = replace(parse_experiment([]), data=quick(tmp_path / "cache"))
    told: list[str] = []
    problems = check_source(f"{server.url}/shards", config, told.append)
    assert "48 photos" in told[0]
    assert len(problems) == 1
    assert "404 Not Found" in problems[0]


def test_a_cache_too_small_for_the_open_shards_is_told(
    server: FileServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    enough = sum(path.stat().st_size for path in server.folder.glob("*/*.tar")) / 2**30
    for room, is_told in ((enough, False), (enough / 2, True)):
        caplog.clear()
        load_manifest(f"{server.url}/shards", data_config(tmp_path / "cache", cache_gb=room), name="train")
        assert ("2 processes have up to 8 shards" in caplog.text) == is_told


def test_an_index_of_other_tars_is_told(server: FileServer, tmp_path: Path) -> None:
    manifest = load_manifest(f"{server.url}/shards", quick(tmp_path / "cache"), name="train")
    image = manifest[0].image
    assert isinstance(image, remote_image.RemoteImage)
    wrong = replace(image, crc32=image.crc32 ^ 1)
    with pytest.raises(DataError, match=r"photo|\.png: checksum differs from the index although the tar"):
        wrong.read()
    image.read()


def test_a_url_that_is_no_set_is_told(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"/nothing/shards.json: cannot be fetched .*404.*folder of a finished"
    ):
        load_manifest(f"{server.url}/nothing", quick(tmp_path / "cache"), name="train")


def test_the_order_of_shards_is_chosen_by_where_the_photos_are(
    server: FileServer, shards: Path, tmp_path: Path
) -> None:
    config = replace(quick(tmp_path / "cache"), order="auto", shuffle_shards=3)
    there = [sample.image for sample in load_manifest(f"{server.url}/shards", config, name="train")]
    here = [sample.image for sample in load_manifest(str(shards), config, name="train")]
    loose = load_manifest(str(shards.parent / "loose" / "table.csv"), config, name="train")
    order = shard_order_of(there, config)
    assert order is not None
    assert order.window == 3
    assert len(set(order.shards.tolist())) == len(list(shards.glob("*.tar")))
    assert shard_order_of(there, config, reads_photos=False) is None
    assert shard_order_of(here, config) is None
    kept = shard_order_of(here, replace(config, order="shards"))
    assert kept is not None
    assert kept.shards.tolist() == order.shards.tolist()
    assert shard_order_of(there, replace(config, order="shuffled")) is None
    with pytest.raises(ConfigError, match=r"data.order is 'shards', but .*0.png is not in a shard"):
        shard_order_of([sample.image for sample in loose], replace(config, order="shards"))
