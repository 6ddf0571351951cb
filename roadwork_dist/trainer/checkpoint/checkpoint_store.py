"""Stores checkpoints atomically: each is complete or absent.

A checkpoint is a folder ``step-<number>``. All ranks write it under a temporary name, every file is
synced, a manifest with each file's size and SHA-256 is written last, and the folder is renamed.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.common.files import sha256_of_file, sync_folder, write_atomic
from roadwork_dist.trainer.checkpoint.together import on_main, together
from roadwork_dist.trainer.engine.collectives import rank

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_REPLACED = ".tmp-old-"
DAMAGED = ".damaged"
"""Suffix of a damaged checkpoint that was put aside."""

Files = dict[str, dict[str, int | str]]


class CheckpointStore:
    """The checkpoints of a run.

    Args:
        folder: that holds them, shared by all ranks; created at the first save.
        keep: number of newest ones to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the existing checkpoints, oldest first (not verified)."""
        names = (path.name for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8,})", name)))

    def put_aside(self) -> list[Path]:
        """Folders of checkpoints that turned out to be damaged."""
        return sorted(self.folder.glob(f"step-*{DAMAGED}*"))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def save(
        self,
        step: int,
        write: Callable[[Path], Iterable[str]],
        *,
        best_step: int | None = None,
        spared: int | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> int:
        """Save a checkpoint and prune the older ones. A collective: all ranks call it together.

        Args:
            step: names the checkpoint; one of the same step is replaced.
            write: writes this rank's files to the folder it is given and returns their names; may use
                collectives that fail on all ranks or none.
            best_step: a checkpoint that pruning keeps besides the newest.
            spared: another one.
            group: for the ranks' communication.

        Returns:
            Bytes of all files.

        Raises:
            CheckpointError: on all ranks if one of them could not write; existing checkpoints are kept.
        """
        final = self.path(step)
        temporary, replaced = self.folder / f".tmp-{final.name}", self.folder / f"{_REPLACED}{final.name}"

        def begin() -> None:
            self._clear()
            temporary.mkdir(parents=True)

        def finish() -> None:
            _seal(temporary, {name: entry for share in shares for name, entry in share.items()})
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            sync_folder(self.folder)

        try:
            on_main(begin, group)
            shares = together(lambda: describe(temporary, write(temporary)), group)
            on_main(finish, group)
        except CheckpointError as error:
            last = on_main(self._take_back, group)
            raise CheckpointError(
                f"checkpoint of step {step} could not be written to {self.folder} ({error}): "
                + (f"the last good one is {last}; " if last else "there is none yet; ")
                + "make room or fix the folder, then start again to resume from there"
            ) from error
        if rank() == 0:
            self._clear()
            self.prune(newest=step, best_step=best_step, spared=spared)
        return sum(int(entry["bytes"]) for share in shares for entry in share.values())

    def _take_back(self) -> str | None:
        """Undo a failed save, and return the name of the newest checkpoint that is left."""
        self._put_back()
        self._clear()
        left = self.steps()
        return self.path(left[-1]).name if left else None

    def _put_back(self) -> None:
        """Restore a checkpoint that a save of the same step was replacing when it failed or was killed."""
        for replaced in self.folder.glob(f"{_REPLACED}*"):
            final = self.folder / replaced.name.removeprefix(_REPLACED)
            if not final.exists():
                replaced.rename(final)

    def _clear(self) -> None:
        """Delete the temporary files of a killed save."""
        for path in self.folder.glob(".tmp-*"):
            shutil.rmtree(path, ignore_errors=True)

    def prune(
        self, *, newest: int | None = None, best_step: int | None = None, spared: int | None = None
    ) -> list[Path]:
        """Delete all but the newest and the best.

        Args:
            newest: ignore later ones: they could not be read, or training would have resumed from there,
                and they must not displace the good ones. None = there are none.
            best_step: is kept as well.
            spared: is kept too.

        Returns:
            Folders that were deleted.
        """
        deleted = self.surplus(newest=newest, best_step=best_step, spared=spared)
        for path in deleted:
            shutil.rmtree(path, ignore_errors=True)
        return deleted

    def surplus(
        self, *, newest: int | None = None, best_step: int | None = None, spared: int | None = None
    ) -> list[Path]:
        """What :meth:`prune` would delete."""
        good = [step for step in self.steps() if newest is None or step <= newest]
        return [self.path(step) for step in good[: -self.keep] if step not in (best_step, spared)]

    def verified(self, step: int | None) -> Path | None:
        """The checkpoint of a step, if it exists and verifies."""
        try:
            if step is not None:
                verify(self.path(step))
                return self.path(step)
        except CheckpointError as error:
            logger.warning("%s", error)
        return None

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies."""
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except CheckpointError:
                continue
            return self.path(step)
        return None

    def recover(self) -> Path | None:
        """The newest checkpoint that verifies; each later one is renamed to ``….damaged`` and logged.

        Raises:
            OSError: one cannot be renamed.
        """
        self._put_back()
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except CheckpointError as error:
                aside = _free_name(self.path(step))
                self.path(step).rename(aside)
                logger.warning("%s; kept as %s, trying the one before it", error, aside.name)
            else:
                return self.path(step)
        return None


def _free_name(path: Path) -> Path:
    """A name for a damaged checkpoint; the same step may be damaged twice."""
    name, number = path.with_name(path.name + DAMAGED), 1
    while name.exists():
        number += 1
        name = path.with_name(f"{path.name}{DAMAGED}-{number}")
    return name


def describe(folder: Path, names: Iterable[str]) -> Files:
    """Sync files and return their sizes and checksums."""
    files: Files = {}
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of_file(folder / name)}
    return files


def _seal(folder: Path, files: Files) -> None:
    """Write the manifest, which comes last.

    Raises:
        CheckpointError: a file that another rank has written is not visible here.
    """
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{name} was written by its rank but is not visible from rank 0: output_dir has to be on a "
                "file system that all nodes share"
            )
    write_atomic(folder / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1).encode())


def read_manifest(folder: Path) -> Files:
    """Sizes and checksums of a checkpoint's files, by their paths in it.

    Raises:
        CheckpointError: there is no manifest or it cannot be read.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        if not isinstance(files, dict) or not files:
            raise TypeError(f"files is {files!r}")
        return {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in files.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {folder} is not complete: it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} cannot be read ({error!r})") from error


def verify(folder: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing, cut short or changed, or there is no manifest.
    """
    found = damage(folder, read_manifest(folder))
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise CheckpointError(f"checkpoint {folder}: {found[0]}{more}")


def damage(folder: Path, files: Mapping[str, Mapping[str, int | str]]) -> list[str]:
    """What is wrong with each file of a checkpoint that does not match its manifest."""

    def check(name: str) -> str | None:
        expected = files[name]
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, expected {expected['bytes']}"
            if sha256_of_file(folder / name) != expected["sha256"]:
                return f"{name} does not match its SHA-256"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        except ValueError as error:  # a null byte in a damaged manifest's name
            return f"{name!r} cannot be read ({error})"
        return None

    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing releases the GIL
        return [found for found in pool.map(check, files) if found is not None]
