"""``roadwork-dist shard`` and what the other commands make of shards."""

import argparse
import json
import os
from pathlib import Path

import pytest
from support.shards import load, write_photos

from roadwork_dist.cli.main import main
from roadwork_dist.cli.shard import byte_size, split_settings
from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.recipes.shards import cosines, view_kinds
from roadwork_dist.sources import is_synthetic


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), size=(320, 240))


def shard(*words: object) -> int:
    return main(["shard", *map(str, words), "--workers", "1"])


def test_a_set_is_written_once(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    assert shard(table, out, "--size", "40KB") == 0
    said = capsys.readouterr().out
    count = len(list(out.glob("*.tar")))
    assert count > 2
    assert f"{out}: {count} shards ({count} written), 12 photos, " in said
    assert "writing shards of" in said
    assert shard(table, out, "--size", "40KB") == 0
    assert f"{count} shards (0 written, {count} were there), 12 photos" in capsys.readouterr().out
    assert load(out).ids == load(table).ids


def test_settings_of_data_apply(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = table.read_text().replace("label", "has_roadwork")
    other = table.parent / "other.csv"
    other.write_text(text.replace("photo-1.jpg", "gone.jpg"))
    words = ("--data.columns.label", "has_roadwork", "--name=train")
    assert shard(other, tmp_path / "set", *words) == 2
    assert "1 of 12 photos (8.3%) are unreadable, expected at most 1.0%" in capsys.readouterr().err
    assert shard(other, tmp_path / "set", *words, "--data.max_unreadable_share=0.1") == 0
    told = capsys.readouterr()
    assert "11 photos" in told.out
    assert told.err.startswith("1 of 12 photos are unreadable and left out:\n  ")
    assert "gone.jpg: there is no such file" in told.err
    assert (tmp_path / "set" / "train-000000.tar").exists()
    labels = load(table).labels.tolist()
    assert load(tmp_path / "set").labels.tolist() == [*labels[:1], *labels[2:]]
    assert main(["data", "check", str(tmp_path / "set")]) == 0
    assert "  1 photos were left out when it was written, such as: " in capsys.readouterr().out


def test_compact_shards_tell_what_they_cost(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    words = ("--compact", "--views.size", "64", "--backbone.dtype=fp32")
    assert shard(table, out, *words, "--sample", "2") == 0
    said = capsys.readouterr().out
    assert "x smaller than before" in said
    assert "original against compact (efficientnet_lite0, fp32, 2 photos):" in said
    for kind in ("global", "tiles", "squares"):
        (line,) = [line for line in said.splitlines() if line.startswith(f"  {kind} ")]
        mean, least = (float(part.split()[-1]) for part in line.split(","))
        assert 0.8 < least <= mean <= 1.0001
    assert shard(table, out, *words, "--sample", "0") == 0
    assert "cosine" not in capsys.readouterr().out
    assert json.loads((out / "shards.json").read_text())["settings"]["views"]["size"] == 64


def test_similarities_are_of_each_view() -> None:
    import torch

    left = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    right = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert cosines(left, right) == pytest.approx([1, 0, 0.5**0.5])
    assert view_kinds(12) == ["global", *["tiles"] * 9, "squares", "squares"]
    assert view_kinds(1) == ["global"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sise", "1GB"], "unknown option --sise: did you mean --size;"),
        (["--compakt"], "did you mean --compact;"),
        (["--data.trian", "x"], "did you mean 'data.train'?"),
        (["--size", "much"], "'much' is not a size such as 1GB"),
        (["--size", "1KB"], "the size of a shard is 1000 bytes, expected at least 10240"),
        (["--name", "a/b"], "the name of shards is 'a/b'"),
        (["--compact", "--quality", "101", "--sample", "0", "--views.size", "64"], "expected 1 to 100"),
    ],
)
def test_mistakes_are_told_in_one_line(
    table: Path, tmp_path: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(table, tmp_path / "set", *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert says in lines[0]
    assert not (tmp_path / "set").exists()


def test_sizes() -> None:
    assert byte_size("1GB") == 10**9
    assert byte_size("1.5 mb") == 1_500_000
    assert byte_size("2GiB") == 2 * 1024**3
    assert byte_size("30000") == byte_size("30000B") == 30_000
    for wrong in ("", "GB", "1XB", "-1GB", "1iB"):
        with pytest.raises(argparse.ArgumentTypeError):
            byte_size(wrong)


def test_settings_are_told_from_options() -> None:
    words = ["a", "--size", "1GB", "--data.max_pixels", "7", "b", "--views.size=9", "--config"]
    assert split_settings(words) == (
        ["a", "--size", "1GB", "b"],
        ["--data.max_pixels", "7", "--views.size=9", "--config"],
    )


def test_data_check_tells_what_is_wrong_per_shard(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    assert shard(table, out, "--size", "40KB") == 0
    assert main(["data", "check", str(out)]) == 0
    assert f"{out}: 12 photos, 12 readable, 0 unreadable" in capsys.readouterr().out
    size = (out / "shard-000001.tar").stat().st_size
    os.truncate(out / "shard-000001.tar", 20_000)
    assert main(["data", "check", str(out)]) == 2
    told = capsys.readouterr()
    assert f"  {out}/shard-000001.tar: has 20,000 bytes, expected {size:,}; is not a complete tar" in told.out
    assert f"error: {out}: 1 tar is not as shards.json and the index describe" in told.err
    assert "photos" in told.err
    assert "are unreadable, expected at most 1.0%" in told.err
    # The same command mends it.
    assert shard(table, out, "--size", "40KB") == 0
    assert main(["data", "check", str(out)]) == 0


def test_shards_of_synthetic_photos_say_so(table: Path, tmp_path: Path) -> None:
    """A report of figures on synthetic photos has to say that they are synthetic."""
    config = DataConfig()
    assert not is_synthetic(str(table), config)
    assert shard(table, tmp_path / "real") == 0
    assert not is_synthetic(str(tmp_path / "real"), config)
    (tmp_path / "rendered").mkdir()
    for path in table.parent.iterdir():
        (tmp_path / "rendered" / path.name).symlink_to(path)
    (tmp_path / "rendered" / "synthetic.json").write_text("{}")
    assert shard(tmp_path / "rendered", tmp_path / "set") == 0
    assert is_synthetic(str(tmp_path / "set"), config)
    assert not is_synthetic("hf:owner/name:train", config)


def test_a_set_that_is_not_finished_is_told(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(table, tmp_path / "set") == 0
    (tmp_path / "set" / "shards.json").rename(tmp_path / "set" / ".plan.json")
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path / "set")]) == 2
    assert "has finished: start that command again" in capsys.readouterr().err
