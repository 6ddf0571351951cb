"""A run on shards gives the same results as one on the files they were made from."""

from pathlib import Path

import pytest
from support.tiny_run import tiny_arguments, tiny_set

from roadwork_dist.cli.main import main
from roadwork_dist.photos.images import FileImage


def test_a_run_on_shards_gives_the_same_predictions_from_the_same_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_set(tmp_path / "photos")
    arguments = [*tiny_arguments(data, tmp_path), "--eval.report=false"]
    assert main(["pretrain", *arguments]) == 0
    features = sizes(tmp_path / "features")
    for name in ("train", "val", "target"):
        out = tmp_path / "shards" / name
        assert main(["shard", str(data.folder / f"{name}.csv"), str(out), "--size=20KB", "--workers=1"]) == 0
        assert len(list(out.glob("*.tar"))) > 1
        arguments.append(f"--data.{name}={out}")
    monkeypatch.setattr(FileImage, "read", lambda self: pytest.fail("a loose file was read"))
    assert main(["pretrain", *arguments, f"--output_dir={tmp_path / 'sharded'}"]) == 0
    predictions = [(tmp_path / run / "predictions.parquet").read_bytes() for run in ("run", "sharded")]
    assert predictions[0] == predictions[1]
    # Found by the hashes in the index; none was computed again.
    assert sizes(tmp_path / "features") == features


def sizes(folder: Path) -> dict[Path, int]:
    """Of all files but the notes of who has used the features."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "notes.json")
    return {path: path.stat().st_size for path in files}
