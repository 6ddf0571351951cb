"""``roadwork-dist features``: extract, list, verify, prune."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.ranks import run
from support.tiny_run import tiny_arguments, tiny_set

from roadwork_dist.cli.main import main
from roadwork_dist.demo.synthetic.dataset import SyntheticSet
from roadwork_dist.features.store import FeatureSpace, FeatureStore
from roadwork_dist.features.store.catalogue import Catalogue
from roadwork_dist.features.store.index import concatenate
from roadwork_dist.features.store.locks import FileLock
from roadwork_dist.features.store.part import parts_in
from roadwork_dist.features.store.upkeep import spaces_in


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSet:
    return tiny_set(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two kinds of features, and one that was used a year ago."""
    root = tmp_path / "features"
    for name in ("tiny conv", "large conv", "old conv"):
        with FeatureStore(root, FeatureSpace({"size": 48}, None, f"{name} bf16", "fp32")) as filled:
            for number in range(5):
                filled.put(f"c{number}", "", None, torch.full((3, 4), float(number)))
        filled.note(name, "photos.csv", 5)
        if name == "old conv":
            year = time.time() - 365 * 86400
            os.utime(filled.folder / "in-use.lock", (year, year))
    return root


def space_of(root: Path, backbone: str) -> Path:
    (folder,) = (p.parent for p in root.glob("*/manifest.json") if backbone in p.read_text())
    return folder


def test_features_are_computed_beforehand_and_found_by_training(
    data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*tiny_arguments(data, tmp_path), "--eval.report=false"]
    assert main(["features", *arguments]) == 0
    told = capsys.readouterr().out
    assert "8 photos: 8 computed at " in told
    assert " images/s, 0 found; in " in told
    assert "images/s" in next(line for line in told.splitlines() if line.startswith("features of"))
    assert main(["features", *arguments]) == 0
    assert "8 photos: 0 computed, 8 found" in capsys.readouterr().out
    assert main(["pretrain", *arguments]) == 0
    told = capsys.readouterr().out
    assert told.count("8 were there") == 1
    assert told.count("4 were there") == 2
    assert main(["features", "list", f"--dir={tmp_path / 'features'}"]) == 0
    told = capsys.readouterr().out
    assert "efficientnet_lite0 (" in told
    assert "augmented (" in told
    assert "not augmented" in told
    assert "(8 photos)" in told
    assert "2 kinds of features" in told


def values_in(root: Path) -> dict[str, list[tuple[int, ...]]]:
    """Checksums and sizes of all entries by space, sorted by key."""
    found = {}
    for folder in spaces_in(root):
        catalogue = Catalogue(folder)
        entries = concatenate([catalogue.merged, catalogue.recent]).in_order()
        columns = (entries.high, entries.low, entries.views, entries.crc)
        found[folder.name] = list(zip(*(column.tolist() for column in columns), strict=True))
    return found


def test_two_processes_compute_what_one_computes(data: SyntheticSet, tmp_path: Path) -> None:
    arguments = [*tiny_arguments(data, tmp_path), f"--features.dir={tmp_path / 'one'}"]
    assert main(["features", *arguments]) == 0
    codes = run(main, ["features", *arguments, f"--features.dir={tmp_path / 'two'}"], world_size=2)
    assert codes == [0, 0]
    assert values_in(tmp_path / "two") == values_in(tmp_path / "one")
    assert all(len(parts_in(folder / "parts")) == 2 for folder in spaces_in(tmp_path / "two"))


def test_settings_that_keep_nothing_are_refused(
    data: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["features", *tiny_arguments(data, tmp_path), "--features.mode=online"]) == 2
    assert "features.mode is 'online'" in capsys.readouterr().err
    assert main(["features", "prun"]) == 2
    assert "did you mean 'features prune'" in capsys.readouterr().err
    assert main(["features", "list", "--dir=nowhere"]) == 2
    assert "nowhere is not a folder, expected a feature store" in capsys.readouterr().err


def test_list_tells_what_is_kept(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used = (space_of(store, "old conv") / "in-use.lock").stat().st_mtime
    assert main(["features", "list", f"--dir={store}"]) == 0
    told = capsys.readouterr().out
    assert told.count("  5 entries  ") == 3
    assert told.count("of photos.csv (5 photos)") == 3
    assert "last used 365 d ago" in told
    assert "3 kinds of features" in told
    assert (space_of(store, "old conv") / "in-use.lock").stat().st_mtime == used, "looking is no use"


def test_verify_names_damaged_entries_and_forgets_them(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = space_of(store, "tiny conv")
    assert main(["features", "verify", f"--dir={store}"]) == 0
    assert capsys.readouterr().out.count("whole, 5 entries") == 3
    (part,) = parts_in(folder / "parts")
    content = bytearray(part.values.read_bytes())
    content[2 * 48 + 7] ^= 1
    part.values.write_bytes(content)
    assert main(["features", "verify", f"--dir={store}"]) == 1
    told = capsys.readouterr().out
    assert f"{folder.name}: DAMAGED: {part.values} at byte 96: 3 views of the entry " in told
    assert "1 of 5 entries are damaged and will be computed again" in told
    assert main(["features", "verify", f"--dir={store}"]) == 0
    assert f"{folder.name}: whole, 4 entries" in capsys.readouterr().out


def test_prune_deletes_what_is_unused_and_unfinished_when_told_so(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, folder = space_of(store, "old conv"), space_of(store, "tiny conv")
    leftovers = [folder / name for name in ("index-0123.tmp", "parts/00-dead.values", "plain")]
    leftovers[0].write_bytes(b"x" * 100)
    leftovers[1].write_bytes(b"x" * 100)
    leftovers[2].mkdir()
    before = sorted(store.rglob("*"))
    assert main(["features", "prune", f"--dir={store}"]) == 0
    told = capsys.readouterr().out
    assert f"{old}: not used for 365 days" in told
    assert told.count("would be deleted") == 4
    assert "nothing was deleted: add --yes" in told
    assert sorted(store.rglob("*")) == before
    assert main(["features", "prune", f"--dir={store}", "--yes"]) == 0
    assert not old.exists()
    assert not any(path.exists() for path in leftovers)
    assert main(["features", "verify", f"--dir={store}"]) == 0
    assert capsys.readouterr().out.count("whole, 5 entries") == 2
    assert main(["features", "prune", f"--dir={store}", folder.name, "--yes"]) == 0
    assert not folder.exists()
    assert space_of(store, "large conv").exists()
    assert main(["features", "prune", f"--dir={store}", "abc", "--yes"]) == 2
    assert "holds no space abc" in capsys.readouterr().err


WRITES = """
import sys, time, torch
from roadwork_dist.features.store import FeatureSpace, FeatureStore
store = FeatureStore(sys.argv[1], FeatureSpace({"size": 48}, None, "tiny conv bf16", "fp32"))
store.put("new", "", None, torch.zeros(1, 4))
store.flush()
print("written", flush=True)
time.sleep(60)
"""


def test_prune_spares_what_a_living_process_writes(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = space_of(store, "tiny conv")
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(store)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == "written\n"
        leftover = folder / "index-0123.tmp"
        leftover.write_bytes(b"")
        for words in ([], [folder.name]):
            assert main(["features", "prune", f"--dir={store}", *words, "--yes"]) == 0
            assert f"{folder}" in (told := capsys.readouterr().out)
            assert "stays: is used by a running process" in told
        assert leftover.exists()
        assert main(["features", "list", f"--dir={store}"]) == 0
        assert "in use" in capsys.readouterr().out
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    assert main(["features", "prune", f"--dir={store}", "--unused_days=0", "--yes"]) == 0
    assert not folder.exists()


def test_a_space_that_is_pruned_while_it_is_opened_is_made_anew(store: Path) -> None:
    space = FeatureSpace({"size": 48}, None, "tiny conv bf16", "fp32")
    folder = space_of(store, "tiny conv")
    lock = FileLock(folder / "in-use.lock", shared=False)
    (folder / "manifest.json").unlink()
    (folder / "in-use.lock").unlink()
    lock.release()
    with FeatureStore(store, space) as opened:
        assert (opened.folder / "manifest.json").is_file()
