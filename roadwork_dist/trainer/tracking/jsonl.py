"""``metrics.jsonl``: one JSON object per line, and each optimizer step exactly once even after a kill."""

import json
import logging
import math
import os
from typing import IO, Any

from roadwork_dist.common.errors import RoadworkError
from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.events.state import StepResult
from roadwork_dist.trainer.tracking.figures import step_figures

logger = logging.getLogger(__name__)


class JsonLines(Callback):
    """Writes a line per step and per validation (rank 0).

    A checkpoint stores the length of the file. Resuming from it truncates what was written later, because
    those steps are repeated.
    """

    key = "JsonLines"
    filename = "metrics.jsonl"

    def __init__(self) -> None:
        self._offset = 0
        self._file: IO[bytes] | None = None

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """Write a line of kind ``train``, or ``skip`` with the ids of the rows that were not finite."""
        line: dict[str, Any] = {
            "kind": "skip" if result.skipped else "train",
            "step": run.state.step,
            "epoch": run.state.epoch,
        }
        line |= step_figures(run, result)
        if result.skipped:
            line["samples"] = run.sample_ids(result.bad_rows)
        self._write(run, line)

    def on_validation_end(self, run: Run, metrics: dict[str, float], improved: bool) -> None:
        """Write a line of kind ``val``."""
        self._write(run, {"kind": "val", "step": run.state.step, "epoch": run.state.epoch, **metrics})

    def on_figures(self, run: Run, kind: str, figures: dict[str, Any]) -> None:
        """Write a line of that kind."""
        self._write(run, {"kind": kind, "step": run.state.step, "epoch": run.state.epoch, **figures})

    def on_epoch_end(self, run: Run) -> None:
        """Flush, so that readers see the epoch."""
        if self._file is not None:
            self._file.flush()

    def on_fit_end(self, run: Run) -> None:
        """Close the file."""
        self._close()

    def on_exception(self, run: Run, error: BaseException) -> None:
        """Close the file; a full disk must not hide the error that came first."""
        try:
            self._close()
        except OSError as close_error:
            logger.warning("%s is not complete: %s", run.run_dir / self.filename, close_error)

    def state_dict(self) -> dict[str, Any]:
        """Length of the file in bytes, after syncing it to disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._offset = self._file.tell()
        return {"offset": self._offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue writing at the stored length."""
        self._offset = state["offset"]

    def _write(self, run: Run, line: dict[str, Any]) -> None:
        if not run.accelerator.is_main_process:
            return
        try:
            if self._file is None:
                self._file = self._open(run)
            self._file.write(_to_json(line).encode() + b"\n")
        except OSError as error:
            raise RoadworkError(
                f"{run.run_dir / self.filename} cannot be written ({error.strerror}): free space or fix the "
                "folder, then start again to resume from the last checkpoint"
            ) from error

    def _open(self, run: Run) -> IO[bytes]:
        path = run.run_dir / self.filename
        file = path.open("r+b" if path.exists() else "w+b")
        size = file.seek(0, os.SEEK_END)
        if size < self._offset:
            logger.warning(
                "%s has %d bytes, the checkpoint expects %d: lines are missing", path, size, self._offset
            )
        file.truncate(min(size, self._offset))
        file.seek(0, os.SEEK_END)
        return file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


_encode = json.JSONEncoder(allow_nan=False).encode


def _to_json(line: dict[str, Any]) -> str:
    """JSON, with NaN and infinities as strings, since JSON has no such numbers."""
    try:
        return _encode(line)
    except ValueError:
        return _encode({name: value if _is_json(value) else str(value) for name, value in line.items()})


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
