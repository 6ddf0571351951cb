"""Run folder lock: one run at a time, and a killed run does not block the next one.

The lock is the file ``run.lock``, which names its owner. Three checks distinguish a living owner from a dead
one; none of them compares clocks:

1. ``flock``: the kernel releases it when the process ends, however it ends. If it is held, the owner lives
   (or a child process that the kill has not reached yet; the lock waits for those).
2. On the same machine: the owner's process id and start time. Where files cannot be locked (Windows, some
   network file systems), only this and the touches below remain.
3. On another machine, if the file system does not share ``flock`` between machines: the owner touches the
   file every few seconds, and the next start watches whether it still does. The times are those of the file
   system and are only compared with each other.
"""

import json
import logging
import os
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from roadwork_dist.common.errors import RunLockedError
from roadwork_dist.common.flock import Flock, give_back, open_locked
from roadwork_dist.common.process_identity import ProcessIdentity, is_alive, is_here, own_identity
from roadwork_dist.trainer.engine.collectives import broadcast_object
from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import StepResult
from roadwork_dist.trainer.guards.preemption import INTERRUPTED

logger = logging.getLogger(__name__)

LOCK = "run.lock"
TOUCH_EVERY_S = 5.0
"""Interval at which the owner touches the lock."""
SILENCE_S = 30.0
"""After so long without a touch, an owner on another machine is considered dead."""
_ORPHANS_S = 10.0


@dataclass(frozen=True)
class Owner:
    """The owner of a lock."""

    process: ProcessIdentity
    since: str  # UTC, for people

    def __str__(self) -> str:
        return f"process {self.process.pid} on host {self.process.host}, started {self.since}"


class FolderLock:
    """The lock of one folder.

    Args:
        folder: exists and can be written to.
        touch_every: seconds between touches.
        silence: seconds without a touch after which an owner on another machine is considered dead.
    """

    def __init__(
        self, folder: Path, *, touch_every: float = TOUCH_EVERY_S, silence: float = SILENCE_S
    ) -> None:
        self.path, self.touch_every, self.silence = folder / LOCK, touch_every, silence
        self.owner = Owner(own_identity(), datetime.now(UTC).isoformat(timespec="seconds"))
        self.lost_to: Owner | None = None
        """Who has taken over the lock, because this process was stopped for too long."""
        self._handle: int | None = None
        self._ended = threading.Event()
        self._toucher: threading.Thread | None = None

    def acquire(self) -> None:
        """Acquire the lock; waits if it is not immediately clear whether the owner lives.

        Raises:
            RunLockedError: another run uses the folder; names its host, process and start.
        """
        handle, is_exclusive = self._open()
        try:
            self._refuse_if_owned(handle)
            _write(handle, self.owner)
            if not is_exclusive:  # two may have written; the last writer owns the lock
                time.sleep(1.0)
                if (winner := _read(self.path)) != self.owner:
                    self._refuse(winner)
        except BaseException:
            os.close(handle)
            raise
        self._handle, self.lost_to = handle, None
        self._ended.clear()
        self._toucher = threading.Thread(target=self._touch, args=(handle,), daemon=True, name="run lock")
        self._toucher.start()

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._handle is None:
            return
        self._ended.set()
        if self._toucher is not None:
            self._toucher.join(1.0)  # it must not touch a closed handle whose number was reused
        if _read(self.path) == self.owner:
            self.path.unlink(missing_ok=True)  # while still held, so no other run can acquire it in between
        give_back(self._handle)
        self._handle = None

    def _open(self) -> tuple[int, bool]:
        """Open the file and take its ``flock``; returns the handle and whether ``flock`` works here."""
        started = time.monotonic()
        while True:
            handle, held = open_locked(self.path, mode=0o644)
            if held is not Flock.OTHERS:
                return handle, held is Flock.HELD
            owner = _read(self.path)
            # A loader process that briefly outlives its killed parent still holds the flock.
            is_orphaned = owner is not None and is_here(owner.process) and not is_alive(owner.process)
            if not (is_orphaned and time.monotonic() - started < _ORPHANS_S):
                self._refuse(owner)
            time.sleep(0.1)

    def _refuse_if_owned(self, handle: int) -> None:
        owner = _parse(os.pread(handle, 4096, 0))
        if owner is None:  # no owner
            return
        if is_here(owner.process):
            if is_alive(owner.process):
                self._refuse(owner)
            logger.warning("the lock of %s was left by a dead run: %s", self.path.parent, owner)
            return
        logger.warning(
            "%s was in use by %s: checking for %.0f s whether it still is",
            self.path.parent,
            owner,
            self.silence,
        )
        if self._is_touched():
            self._refuse(owner)

    def _is_touched(self) -> bool:
        """Whether the file is touched or replaced before the time is over."""
        first, started = _snapshot(self.path), time.monotonic()
        while time.monotonic() - started < self.silence:
            time.sleep(min(1.0, self.touch_every / 5))
            if _snapshot(self.path) != first:
                return True
        return False

    def _refuse(self, owner: Owner | None) -> None:
        raise RunLockedError(
            f"{self.path.parent} is in use by {owner or 'another run'}: wait for it, stop it, or choose "
            "another output_dir"
        )

    def _touch(self, handle: int) -> None:
        while not self._ended.wait(self.touch_every):
            try:
                if (owner := _read(self.path)) not in (None, self.owner):
                    self.lost_to = owner
                    return
                os.utime(handle)  # the file system's own time, on NFS the server's
            except OSError as error:  # just released, or a temporary file system failure
                logger.debug("%s could not be touched: %s", self.path, error)


def _snapshot(path: Path) -> tuple[int, int, bytes]:
    """What a touch changes. Opened each time: NFS then queries its server, otherwise only after a minute."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            return state.st_ino, state.st_mtime_ns, file.read()
    except OSError:
        return 0, 0, b""


def _write(handle: int, owner: Owner) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(asdict(owner)).encode(), 0)
    os.fsync(handle)


def _read(path: Path) -> Owner | None:
    return _parse(_snapshot(path)[2])


def _parse(content: bytes) -> Owner | None:
    try:
        fields = json.loads(content)
        return Owner(ProcessIdentity(**fields["process"]), fields["since"])
    except (ValueError, KeyError, TypeError):  # empty, or its owner died while writing
        return None


class RunLock(Callback):
    """Holds the run folder's lock during training (rank 0, for all ranks)."""

    def __init__(self) -> None:
        self.lock: FolderLock | None = None

    def on_fit_start(self, run: Run) -> None:
        """Acquire the lock, and remove the note that an earlier run was interrupted.

        Raises:
            RunLockedError: another run uses the folder; on every rank.
        """
        refused = None
        if run.accelerator.is_main_process:
            lock = FolderLock(run.run_dir)
            try:
                lock.acquire()
                (run.run_dir / INTERRUPTED).unlink(missing_ok=True)
                self.lock = lock
            except RunLockedError as error:
                refused = str(error)
            except OSError as error:
                refused = f"{lock.path} cannot be written ({error.strerror}): fix its permissions"
        # All ranks get here, so all raise together instead of waiting for one that is gone.
        refused = broadcast_object(refused)
        if refused is not None:
            raise RunLockedError(refused)

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Stop writing to the folder if another run has taken it over.

        Raises:
            RunLockedError: it was taken over (rank 0 only; the others end as they do when a rank dies).
        """
        if self.lock is not None and self.lock.lost_to is not None:
            raise RunLockedError(
                f"{run.run_dir} was taken over by {self.lock.lost_to} while this run was stopped for more "
                f"than {self.lock.silence:.0f} s: this run ends and writes nothing more there"
            )

    def on_fit_end(self, run: Run) -> None:
        """Release the lock."""
        self._release()

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Release the lock."""
        self._release()

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None
