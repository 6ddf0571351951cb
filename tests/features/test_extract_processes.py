"""Extraction by several processes, killed and started again; every figure is compared with one process's."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.disks import small_file_system
from support.ranks import run, spawn
from test_extract import GEOMETRY, TinyEncoder, contents, jpeg

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.config.experiment import AugmentConfig
from roadwork_dist.features.content_hashes import content_hashes
from roadwork_dist.features.extract import Extraction, extract
from roadwork_dist.features.store import FeatureSpace, FeatureStore
from roadwork_dist.features.store import feature_store as store_module
from roadwork_dist.photos.augment import Augmenter
from roadwork_dist.photos.images import BytesImage
from roadwork_dist.photos.manifest import Sample
from roadwork_dist.photos.photo import PhotoViews

COUNT, COPIES = 12, 2
VIEWS = PhotoViews(GEOMETRY, Augmenter(AugmentConfig(copies=COPIES), 5))


def computed(
    root: Path, share: tuple[int, int] = (0, 1), kill_after: int | None = None
) -> tuple[Extraction, int]:
    """Extract and count the encoder's calls; with ``kill_after``, die behind so many durable entries."""
    assert VIEWS.augmenter is not None
    samples = [Sample(f"s{k}", BytesImage(f"{k}.jpg", jpeg(k))) for k in range(COUNT)]
    store = FeatureStore(
        root, FeatureSpace(GEOMETRY.identity(), VIEWS.augmenter.identity(), "tiny conv", "fp32")
    )
    encode = TinyEncoder()
    if kill_after is not None:
        store_module.FLUSH_BYTES = 1  # every entry is durable at once
        put, calls = store.put, iter(range(999))

        def put_or_die(*arguments: object) -> None:
            if next(calls) == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            put(*arguments)  # type: ignore[arg-type]

        store.put = put_or_die  # type: ignore[assignment,method-assign]
    hashes = content_hashes([s.image for s in samples])
    done = extract(samples, hashes, views=VIEWS, store=store, encode=encode, batch_views=8, share=share)
    return done, len(encode.shapes)


def on_rank(root: Path, kill: int | None = None) -> tuple[Extraction, int]:
    rank = int(os.environ["RANK"])
    return computed(root, (rank, 2), kill_after=5 if rank == kill else None)


def whole_set(root: Path) -> tuple[Extraction, int]:
    return computed(root)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By one process."""
    root = tmp_path_factory.mktemp("whole")
    assert computed(root) == (Extraction(COUNT * COPIES, 0), COUNT * COPIES * 12 // 8)
    return root


def test_a_killed_rank_costs_what_it_had_not_written_and_nothing_else(tmp_path: Path, whole: Path) -> None:
    killed = spawn(on_rank, tmp_path, 1, world_size=2)
    assert killed[1].code == -signal.SIGKILL, killed[1].error
    there = contents(tmp_path)
    assert 5 <= len(there) < COUNT * COPIES
    done = run(on_rank, tmp_path, world_size=2)
    assert sum(each.found for each, _ in done) == len(there)
    assert sum(each.computed for each, _ in done) == COUNT * COPIES - len(there)
    for each, calls in done:
        assert calls == -(-each.computed * 12 // 8), "views of entries that were there were computed"
    assert contents(tmp_path) == contents(whole)
    assert computed(tmp_path) == (Extraction(0, COUNT * COPIES), 0)


def test_two_runs_that_extract_the_same_at_once_do_not_disturb_each_other(
    tmp_path: Path, whole: Path
) -> None:
    for done, _ in run(whole_set, tmp_path, world_size=2):
        assert done.computed + done.found == COUNT * COPIES
    assert contents(tmp_path) == contents(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    with small_file_system(tmp_path / "disk", "64k") as folder:
        yield folder


def test_a_disk_that_is_full_is_told_and_what_fits_is_kept(
    small_disk: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "FLUSH_BYTES", 1)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(12 * 4096))
    with pytest.raises(ConfigError, match=r"disk of the feature store .* is full: make room, or set"):
        computed(small_disk)
    ballast.unlink()
    there = len(contents(small_disk))
    assert 1 <= there < COUNT * COPIES
    done, _ = computed(small_disk)
    assert done == Extraction(COUNT * COPIES - there, there)
    assert contents(small_disk) == contents(whole)
