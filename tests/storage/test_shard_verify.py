import os
import shutil
from pathlib import Path

import pytest
from support.shards import load, write_photos, write_set

from roadwork_dist.storage.shards.image import ShardImage
from roadwork_dist.storage.shards.index import read_index, read_set
from roadwork_dist.storage.shards.index import write_set as write_index
from roadwork_dist.storage.shards.verify import verify_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_set(write_photos(folder / "photos"), folder / "train")
    return folder / "train"


@pytest.fixture
def own(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "own")


def problems(folder: Path) -> dict[str, str]:
    return {problem.shard: problem.reason for problem in verify_shards(folder, workers=2)}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_whole_set_has_no_problem(shards: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify_shards(shards, on_progress=lambda done, total: seen.append((done, total))) == []
    assert seen == [(n, 5) for n in range(1, 6)]


def test_a_flipped_bit_names_the_sample(own: Path) -> None:
    image = load(own)[5].image
    assert isinstance(image, ShardImage)
    flip(own / "shard-000001.tar", image.offset + 9)
    (reason,) = problems(own).values()
    assert reason.startswith("checksum differs from shards.json; 1 of 2 samples are lost (000000005)")


def test_a_flipped_bit_of_a_mask_is_found(own: Path) -> None:
    mask = load(own)[3].mask
    assert mask is not None
    flip(own / "shard-000000.tar", mask.image.offset + 9)  # type: ignore[attr-defined]
    assert "1 of 4 samples are lost (000000003)" in problems(own)["shard-000000.tar"]


def test_a_flipped_bit_of_the_metadata_loses_no_sample(own: Path) -> None:
    at = (own / "shard-000000.tar").read_bytes().index(b'"label"')
    flip(own / "shard-000000.tar", at + 1)
    assert "0 of 4 samples are lost:" in problems(own)["shard-000000.tar"]


def test_truncated_missing_and_foreign_tars(own: Path) -> None:
    os.truncate(own / "shard-000000.tar", 6000)
    (own / "shard-000002.tar").unlink()
    shutil.copy(own / "shard-000001.tar", own / "shard-000009.tar")
    found = problems(own)
    assert set(found) == {"shard-000000.tar", "shard-000002.tar", "shard-000009.tar"}
    assert "has 6,000 bytes, expected 20,480; is not a complete tar" in found["shard-000000.tar"]
    assert "3 of 4 samples are lost (000000001, 000000002, 000000003)" in found["shard-000000.tar"]
    assert "cannot be read (No such file or directory)" in found["shard-000002.tar"]
    assert found["shard-000009.tar"] == "is not listed in shards.json: remove it"


def test_two_tars_that_changed_places(own: Path) -> None:
    first, second = own / "shard-000000.tar", own / "shard-000001.tar"
    first.rename(own / "between")
    second.rename(first)
    (own / "between").rename(second)
    found = problems(own)
    assert set(found) == {"shard-000000.tar", "shard-000001.tar"}
    assert "6 members are not where the index has them, such as 000000000.jpg" in found["shard-000000.tar"]
    assert "2 members are not in the index, such as 000000004.png" in found["shard-000000.tar"]


def test_an_index_of_other_offsets(own: Path) -> None:
    """Checksums of tars are right, so only their members tell."""
    shards = read_set(own)
    rows = read_index(own, shards).to_pylist()
    rows[4]["offset"] += 512
    del rows[11]
    kept = {name: getattr(shards, name) for name in ("name", "kind", "source", "shards", "settings")}
    write_index(own, rows, **kept)
    found = problems(own)
    assert set(found) == {"shard-000001.tar", "shard-000004.tar"}
    assert "1 members are not where the index has them, such as 000000004.png" in found["shard-000001.tar"]
    assert "has 0 rows in the index, expected 1; 1 members are not in the index" in found["shard-000004.tar"]
