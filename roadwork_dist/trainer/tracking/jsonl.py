"""``metrics.jsonl``: one JSON object a line, each optimizer step once, also after a kill."""

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

    A checkpoint remembers how long the file was. Going on from it cuts off what was written later,
    because those steps come again.
    """

    key = "JsonLines"
    filename = "metrics.jsonl"

    def __init__(self) -> None:
        self._offset = 0
        self._file: IO[bytes] | None = None

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """A line of kind ``train``, or ``skip`` with the ids of the rows that were not finite."""
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
        """A line of kind ``val``."""
        self._write(run, {"kind": "val", "step": run.state.step, "epoch": run.state.epoch, **metrics})

    def on_figures(self, run: Run, kind: str, figures: dict[str, Any]) -> None:
        """A line of that kind."""
        self._write(run, {"kind": kind, "step": run.state.step, "epoch": run.state.epoch, **figures})

    def on_epoch_end(self, run: Run) -> None:
        """Let readers see the epoch."""
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
        """Length of the file in bytes, all of them on disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._offset = self._file.tell()
        return {"offset": self._offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on writing at the remembered length."""
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
                f"{run.run_dir / self.filename} cannot be written ({error.strerror}): make room or mend the "
                "folder, then start again to go on from the last checkpoint"
            ) from error

    def _open(self, run: Run) -> IO[bytes]:
        path = run.run_dir / self.filename
        file = path.open("r+b" if path.exists() else "w+b")
        size = file.seek(0, os.SEEK_END)
        if size < self._offset:
            logger.warning(
                "%s has %d bytes, the checkpoint knew %d: lines are missing", path, size, self._offset
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
    """JSON, with NaN and infinities, which JSON does not have, as text."""
    try:
        return _encode(line)
    except ValueError:
        return _encode({name: value if _is_json(value) else str(value) for name, value in line.items()})


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
