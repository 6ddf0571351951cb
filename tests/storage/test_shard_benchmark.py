"""The benchmark of shards runs, and compares like with like."""

import gc
import warnings

import data_shards
import pytest

from roadwork_dist.photos.photo import views_of_photo


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> data_shards.Stored:
    return data_shards.store(tmp_path_factory.mktemp("stored"), count=2, size=(1600, 1200))


def test_every_way_gives_the_same_photos(stored: data_shards.Stored) -> None:
    loose = [sample.image.read() for sample in stored.loose]
    assert [sample.image.read() for sample in stored.shards] == loose
    assert [stored.saved[row]["image"]["bytes"] for row in range(2)] == loose
    naive = data_shards.naive_views(loose[0])
    ours = views_of_photo(loose[0], data_shards.GEOMETRY)
    assert len(naive) == len(ours) == 12
    for own, other in zip(naive, ours, strict=True):
        assert abs(other.permute(1, 2, 0).numpy().astype(int) - own).mean() < 3


def test_tables_have_a_row_for_every_way(stored: data_shards.Stored) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset leaves files to the garbage collector
        tables = data_shards.bytes_table(stored, 2, 1), data_shards.views_table(stored, 2)
        profile = data_shards.profile_table(stored, 2, 1)
        gc.collect()
    assert [len(table.splitlines()) for table in tables] == [7, 8]
    steps = [line.split("|")[1].strip() for line in profile.splitlines()[2:]]
    assert steps == ["all", "read, with checksum", "decode", "cut twelve views"]
    assert "| webdataset, sequential | " in tables[0]
    assert "| compact shards | " in tables[1]
    assert "times smaller" in data_shards.sizes(stored)
