"""Checkpoints that are whole or not there."""

import errno
import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.trainer.checkpoint.checkpoint_store import CheckpointStore, verify


def content(step: int) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        (folder / "__0_0.distcp").write_bytes(bytes([step % 256]) * 1000)
        (folder / "state.json").write_text(f'{{"step": {step}}}')
        return ["__0_0.distcp", "state.json"]

    return write


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    for step in (10, 20):
        store.save(step, content(step))
    return store


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def newest_step(store: CheckpointStore) -> int | None:
    newest = store.newest()
    return None if newest is None else int(newest.name.removeprefix("step-"))


def test_a_saved_checkpoint_verifies(store: CheckpointStore) -> None:
    assert store.newest() == store.path(20)
    assert (store.path(20) / "state.json").read_text() == '{"step": 20}'
    assert names(store) == ["step-00000010", "step-00000020"]


def test_an_empty_or_absent_folder_has_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path).newest() is None
    assert CheckpointStore(tmp_path / "absent").newest() is None


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0b100
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    store: CheckpointStore, damage: Callable[[Path], None], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(store.path(20) / name)
    assert newest_step(store) == 10
    assert not caplog.records  # who only looks changes and says nothing
    assert store.recover() == store.path(10)
    (record,) = caplog.records
    assert "step-00000020" in record.message
    assert "kept as step-00000020.damaged, trying the one before it" in record.message
    assert names(store) == ["step-00000010", "step-00000020.damaged"]
    assert store.put_aside() == [store.folder / "step-00000020.damaged"]


def test_a_step_damaged_again_is_kept_beside_the_first(store: CheckpointStore) -> None:
    for _ in range(3):
        flip_a_bit(store.path(20) / "state.json")
        assert store.recover() == store.path(10)
        store.save(20, content(20))
    aside = ["step-00000020.damaged", "step-00000020.damaged-2", "step-00000020.damaged-3"]
    assert names(store) == ["step-00000010", "step-00000020", *aside]
    assert store.steps() == [10, 20]


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"files": []}', '{"files": {}}', '{"files": {"a": 1}}', "\x00"]
)
def test_a_manifest_of_another_form_is_skipped(store: CheckpointStore, manifest: str) -> None:
    (store.path(20) / "manifest.json").write_text(manifest)
    assert newest_step(store) == 10


def test_no_bit_of_a_manifest_can_turn_a_damaged_checkpoint_into_a_good_one(store: CheckpointStore) -> None:
    flip_a_bit(store.path(20) / "__0_0.distcp")
    manifest = store.path(20) / "manifest.json"
    original = manifest.read_bytes()
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 1
        manifest.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            verify(store.path(20))


def test_all_damaged_is_none(store: CheckpointStore) -> None:
    for step in store.steps():
        (store.path(step) / "state.json").unlink()
    assert store.newest() is None


def test_what_a_rank_wrote_elsewhere_is_told(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # A rank on another node describes a file that is not to be seen here.
    elsewhere = {"__1_0.distcp": {"bytes": 3, "sha256": "0" * 64}}
    monkeypatch.setattr(
        "roadwork_dist.trainer.checkpoint.checkpoint_store.describe", lambda folder, names: elsewhere
    )
    with pytest.raises(CheckpointError, match=r"__1_0.distcp .* a file system that all nodes share"):
        store.save(30, content(30))
    assert newest_step(store) == 20


def test_what_a_kill_left_behind_and_other_folders_are_not_checkpoints(store: CheckpointStore) -> None:
    left = store.folder / ".tmp-step-00000030"
    left.mkdir()
    content(30)(left)
    for name in ("step-final", "step-99", "best", "notes.txt"):
        (store.folder / name).mkdir()
    assert store.steps() == [10, 20]
    assert newest_step(store) == 20
    store.save(40, content(40))
    assert not left.exists()  # cleared by the next save
    assert (store.folder / "step-final").exists()


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 7):
        store.save(step, content(step), best_step=2 if step >= 2 else 1)
    assert store.steps() == [2, 5, 6]
    store.save(7, content(7), best_step=7)
    assert store.steps() == [6, 7]


def test_unreadable_later_ones_do_not_push_out_good_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for step in (10, 30):
        store.save(step, content(step), best_step=10)
    flip_a_bit(store.path(30) / "state.json")
    assert newest_step(store) == 10
    store.save(20, content(20))  # training went on from 10
    assert newest_step(store) == 20
    store.save(30, content(30))
    assert (newest_step(store), store.steps()) == (30, [30])


def test_a_save_of_the_same_step_replaces(store: CheckpointStore) -> None:
    (store.path(20) / "state.json").write_text("damaged")
    (store.path(20) / "stale").write_text("")
    store.save(20, content(20))
    assert newest_step(store) == 20
    assert not (store.path(20) / "stale").exists()
    assert names(store) == ["step-00000010", "step-00000020"]


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system itself refuses to write further, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_of_the_same_step_that_was_killed_midway_is_undone(store: CheckpointStore) -> None:
    left = store.folder / ".tmp-step-00000020"
    left.mkdir()
    content(20)(left)
    store.path(20).rename(store.folder / ".tmp-old-step-00000020")  # and then it was killed
    assert store.recover() == store.path(20)


@pytest.mark.parametrize("step", [20, 30])
def test_what_the_system_refuses_to_write_leaves_nothing(store: CheckpointStore, step: int) -> None:
    with files_no_larger_than(500), pytest.raises(CheckpointError) as caught:
        store.save(step, content(step))
    assert "File too large" in str(caught.value)
    assert "the last good one is step-00000020" in str(caught.value)
    assert names(store) == ["step-00000010", "step-00000020"]
    assert newest_step(store) == 20


def test_a_full_disk_without_any_checkpoint_says_so(tmp_path: Path) -> None:
    def full(folder: Path) -> list[str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left on device\): there is none yet"):
        CheckpointStore(tmp_path / "checkpoints").save(1, full)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_rename_that_fails_puts_the_replaced_one_back(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".tmp-step-00000020":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        store.save(20, content(20))
    assert newest_step(store) == 20


def test_an_error_that_is_not_the_disks_is_not_hidden(store: CheckpointStore) -> None:
    def broken(folder: Path) -> list[str]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.save(30, broken)
    assert newest_step(store) == 20


def test_good_checkpoints_are_not_warned_of(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        store.recover()
    assert not caplog.records
