"""Lists, verifies and prunes checkpoints from outside a run."""

import time
from dataclasses import dataclass
from pathlib import Path

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.trainer.checkpoint.callback import read_state
from roadwork_dist.trainer.checkpoint.checkpoint_store import MANIFEST, CheckpointStore, read_manifest, verify

FOLDER = "checkpoints"
"""Folder of the checkpoints in a run folder."""


@dataclass(frozen=True)
class Summary:
    """Summary of a checkpoint.

    Attributes:
        path: its folder.
        size: bytes of its files.
        age: seconds since it was complete; None = not known.
        wrong: why it cannot be used; empty = every file exists in its size (contents are not read).
        step, epoch: progress of the run.
        figure: the monitored metric of its validation; None = there was none.
        monitor: name of that metric.
        processes, engine: that saved it.
        is_best: no earlier validation had a better metric.
    """

    path: Path
    size: int
    age: float | None
    wrong: str
    step: int | None = None
    epoch: int | None = None
    figure: float | None = None
    monitor: str = ""
    processes: int | None = None
    engine: str = ""
    is_best: bool = False


def checkpoints_at(path: Path) -> list[Path]:
    """Checkpoints of a run folder, oldest first, then those put aside as damaged; or the one at a path.

    Raises:
        CheckpointError: there is none.
    """
    if path.name.startswith("step-") and path.is_dir():
        return [path]
    store = _store(path)
    found = [store.path(step) for step in store.steps()] + store.put_aside()
    if not found:
        what = "holds no checkpoint" if path.is_dir() else "is not a folder"
        raise CheckpointError(f"{path} {what}: expected a run folder, or a folder step-… of one")
    return found


def _store(path: Path) -> CheckpointStore:
    return CheckpointStore(path if path.name == FOLDER else path / FOLDER)


def chosen_checkpoint(path: Path, step: int | None = None) -> Path:
    """The checkpoint of a step, else the newest one; verified.

    Args:
        path: run folder, or folder of a checkpoint.
        step: which one of a run; None = the newest intact one.

    Raises:
        CheckpointError: there is none.
    """
    found = checkpoints_at(path)
    if found == [path]:
        verify(path)
        return path
    store = _store(path)
    if step is not None:
        if step not in store.steps():
            there = ", ".join(map(str, store.steps())) or "none"
            raise CheckpointError(f"{path} has no checkpoint of step {step}: there are {there}")
        verify(store.path(step))
        return store.path(step)
    newest = store.newest()
    if newest is None:
        raise CheckpointError(f"{path} has no intact checkpoint: roadwork-dist checkpoint verify says why")
    return newest


def summary(folder: Path) -> Summary:
    """Summarize a checkpoint from its manifest and state."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    manifest = folder / MANIFEST
    age = max(0.0, time.time() - manifest.stat().st_mtime) if manifest.exists() else None
    try:
        for name, entry in read_manifest(folder).items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"]:
                raise CheckpointError(f"{name} does not match {MANIFEST}")
        state = read_state(folder)
        loop = state["state"]
        return Summary(
            folder,
            size,
            age,
            "damaged, put aside" if folder.suffix else "",
            loop["step"],
            loop["epoch"],
            state["figure"],
            state["monitor"],
            state["processes"],
            state["engine"],
            loop["best"] is not None and loop["best_step"] == loop["step"],
        )
    except (CheckpointError, KeyError, TypeError) as error:
        return Summary(folder, size, age, str(error).removeprefix(f"checkpoint {folder}").lstrip(": "))


@dataclass(frozen=True)
class Pruning:
    """Plan of a pruning: which folders are kept, deleted, or skipped as damaged."""

    kept: list[Path]
    gone: list[Path]
    damaged: list[Path]


def plan_pruning(path: Path, keep: int) -> Pruning:
    """Choose what to delete: all but the newest intact ones, the best, and the one a loss spike rewinds to.

    Each of the newest ones is verified before it is kept, so a damaged one does not displace a good one.
    Damaged ones are left for a person to inspect.

    Args:
        path: run folder.
        keep: number of newest intact ones to keep.

    Raises:
        CheckpointError: there is none.
    """
    if path.name.startswith("step-"):
        raise CheckpointError(f"{path} is one checkpoint: expected the folder of its run")
    found = checkpoints_at(path)
    store = _store(path)
    kept: list[Path] = []
    gone: list[Path] = []
    damaged = [each for each in found if each.suffix]
    spared: set[int] = set()
    for step in reversed(store.steps()):
        folder = store.path(step)
        if len(kept) >= keep:
            (kept if step in spared else gone).append(folder)
            continue
        try:
            verify(folder)
            state = read_state(folder)
        except CheckpointError:
            damaged.append(folder)
            continue
        if not kept:
            planned = state["callbacks"].get("Checkpointer", {}).get("planned")
            spared = {state["state"]["best_step"], planned}
        kept.append(folder)
    return Pruning(sorted(kept), sorted(gone), sorted(damaged))
