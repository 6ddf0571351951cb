"""Checkpoints that are whole or not there.

A checkpoint is a folder ``step-<number>``. It is written under a temporary name, every file is
synced, a manifest with each file's size and SHA-256 is written last, and the folder is renamed.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.common.files import sha256_of_file, sync_folder, write_atomic

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class CheckpointStore:
    """The checkpoints of a run. One process writes; any may read.

    Args:
        folder: where they lie; made when the first is saved.
        keep: newest ones that stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, oldest first (not verified)."""
        names = (path.name for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{8,})", name)))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, write: Callable[[Path], None], *, best_step: int | None = None) -> Path:
        """Save a checkpoint and prune the older ones.

        Args:
            step: names the checkpoint; one of the same step is replaced.
            write: fills the folder it is given with files.
            best_step: a checkpoint that pruning leaves besides the newest.

        Raises:
            CheckpointError: it could not be written; those that were there still are.
        """
        final = self.path(step)
        temporary, replaced = self.folder / f".tmp-{final.name}", self.folder / f".tmp-old-{final.name}"
        self._clear()
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            _seal(temporary)
            if final.exists():
                final.rename(replaced)
            temporary.rename(final)
            sync_folder(self.folder)
        except OSError as error:
            if replaced.exists() and not final.exists():
                replaced.rename(final)
            left = self.steps()
            self._clear()
            raise CheckpointError(
                f"checkpoint of step {step} could not be written to {self.folder} "
                f"({error.strerror or error}): "
                + (f"the last good one is {self.path(left[-1]).name}; " if left else "there is none yet; ")
                + "make room or mend the folder, then start again to go on from there"
            ) from error
        self._clear()
        self._prune(step, best_step)
        return final

    def _clear(self) -> None:
        """Delete what a save that was killed left behind."""
        for path in self.folder.glob(".tmp-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self, newest: int, best_step: int | None) -> None:
        # Later ones could not be read, or training would have gone on from there: they must not
        # push out the good ones.
        good = [step for step in self.steps() if step <= newest]
        for step in good[: -self.keep]:
            if step != best_step:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies; each unreadable one is warned of and passed over."""
        for step in reversed(self.steps()):
            try:
                verify(self.path(step))
            except CheckpointError as error:
                logger.warning("%s; trying the one before it", error)
            else:
                return self.path(step)
        return None


def _seal(folder: Path) -> None:
    """Sync every file and describe it in the manifest, which comes last."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    write_atomic(folder / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1).encode())


def verify(folder: Path) -> None:
    """Check a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing, cut short or changed, or there is no manifest.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(
                    f"checkpoint {folder}: {name} has {size} bytes, expected {expected['bytes']}"
                )
            if sha256_of_file(folder / name) != expected["sha256"]:
                raise CheckpointError(f"checkpoint {folder}: {name} does not match its SHA-256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read ({error!r})") from error
