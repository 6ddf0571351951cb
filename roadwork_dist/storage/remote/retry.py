"""Retries with exponential backoff: number of attempts, pauses and final error message."""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from roadwork_dist.common.errors import DataError
from roadwork_dist.storage.remote.transport import RefusedError, Stream, TransientError

T = TypeVar("T")

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 30.0
_WARN_FROM = 3
"""Consecutive failures from which on retries are logged as warnings, which explain the stall."""
LONGEST_ASKED_WAIT_S = 60.0
"""Longest pause on request of a server (``Retry-After``)."""

_jitter = random.Random()  # separate, since the global generator belongs to training


@dataclass(frozen=True)
class Patience:
    """When a server is given up.

    Attributes:
        attempts: consecutive attempts without progress; a download that gains a MiB restarts the count.
        timeout: seconds to wait for a connection and for the next bytes.
        first_pause: seconds before the second attempt; the pauses double.
    """

    attempts: int = 8
    timeout: float = 30.0
    first_pause: float = 0.5


class Stop:
    """Stops a download from another thread, even during a pause or a blocked read."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._stream: Stream | None = None

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """Stop now."""
        with self._lock:
            self._event.set()
            if self._stream is not None:
                self._stream.abort()

    def watch(self, stream: Stream | None) -> None:
        """Abort this stream when stopped; None = no stream."""
        with self._lock:
            self._stream = stream
            if stream is not None and self._event.is_set():
                stream.abort()

    def sleep(self, seconds: float) -> None:
        """Sleep until the time is over or :meth:`set` is called."""
        self._event.wait(seconds)


class ServerDownError(DataError):
    """All attempts failed, so other files of the server may fail as well."""


class StoppedError(Exception):
    """A download was ended by a :class:`Stop`."""


def persist(url: str, patience: Patience, attempt: Callable[[], T], stop: Stop) -> T:
    """Call ``attempt`` until it succeeds.

    The pause doubles up to half a minute and is shortened at random, so that many processes do not
    retry at once. A longer pause that the server requests is respected.

    Args:
        url: URL for messages.
        patience: when to give up.
        attempt: raises TransientError where a retry may help.
        stop: ends the pauses.

    Raises:
        ServerDownError: it failed too often.
        DataError: it was refused. Both name the URL, the server's response and the number of attempts.
        StoppedError: it was stopped.
    """
    began, failed, tried = time.monotonic(), 0, 0
    while True:
        tried += 1
        try:
            return attempt()
        except RefusedError as error:
            raise DataError(_failure_text(url, str(error), tried, began)) from error
        except TransientError as error:
            if stop:
                raise StoppedError from error
            failed = 1 if error.moved_on else failed + 1
            if failed >= patience.attempts:
                raise ServerDownError(_failure_text(url, str(error), tried, began)) from error
            logger.log(
                logging.WARNING if failed >= _WARN_FROM else logging.INFO,
                "%s: %s; retry %d of %d",
                *(url, error, failed, patience.attempts - 1),
            )
            pause = min(LONGEST_WAIT_S, patience.first_pause * 2 ** (failed - 1)) * _jitter.uniform(0.5, 1.0)
            stop.sleep(max(pause, min(error.retry_after, LONGEST_ASKED_WAIT_S)))
        if stop:
            raise StoppedError


def _failure_text(url: str, said: str, tried: int, began: float) -> str:
    times = "once" if tried == 1 else f"{tried} times in {time.monotonic() - began:.0f} s"
    return (
        f"{url}: cannot be fetched ({said}; tried {times}), expected a complete file from the server: "
        "check the address, the server and the network, then start the same command again"
    )
