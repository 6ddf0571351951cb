"""Background saving: a copy in host memory, and a thread that stores it."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Copies of tensors in host memory, page-locked if there is a GPU; the memory is reused."""

    def __init__(self) -> None:
        self._stager: Any = None

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy plain tensors and DTensors (their local parts)."""
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if self._stager is None:
            gpu = torch.cuda.is_available()
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=gpu,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=gpu,
                )
            )
        copies: dict[str, Tensor] = self._stager.stage(dict(tensors))
        return copies

    def close(self) -> None:
        """Free the memory."""
        if self._stager is not None:
            self._stager.close()
            self._stager = None


class Background:
    """A thread that runs one action.

    Args:
        action: to run; it may use collectives of a group that no other thread uses.
        device: of this process.
        on_error: called in the thread if the action fails.
    """

    def __init__(self, action: Callable[[], int], device: torch.device, on_error: Callable[[], None]) -> None:
        self._action, self._device, self._on_error = action, device, on_error
        self._result = 0
        self._error: BaseException | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            if self._device.type == "cuda":  # a new thread uses the first GPU, which may be another rank's
                torch.cuda.set_device(self._device)
            self._result = self._action()
        except BaseException as error:  # raised by wait(), where training can be ended
            self._error = error
            self._on_error()
        finally:
            self.seconds = time.perf_counter() - started

    def wait(self, timeout: float | None = None) -> int:
        """What the action returned, once it is done.

        Raises:
            TimeoutError: it is not done within ``timeout`` seconds.
            BaseException: what the action raised.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"not done within {timeout:g} s")
        if self._error is not None:
            raise self._error
        return self._result
