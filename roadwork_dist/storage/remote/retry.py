"""Trying again: how often, how long in between, and what is said in the end."""

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
_TOLD_FROM = 3
"""Failures in a row from which on a warning tells why reading stands still."""
LONGEST_ASKED_WAIT_S = 60.0
"""A server that asks for longer pauses (``Retry-After``) is asked again after this one."""

_jitter = random.Random()  # of its own: the global generator belongs to training


@dataclass(frozen=True)
class Patience:
    """When a server is given up.

    Attributes:
        attempts: tries in a row that bring nothing on; a download that has gained a MiB counts anew.
        timeout: seconds to wait for a connection and for the next bytes.
        first_pause: seconds before the second try; the pauses double.
    """

    attempts: int = 8
    timeout: float = 30.0
    first_pause: float = 0.5


class Stop:
    """Ends a download from another thread: pauses, and a read that waits for the server."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._stream: Stream | None = None

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self) -> None:
        """Now."""
        with self._lock:
            self._event.set()
            if self._stream is not None:
                self._stream.abort()

    def watch(self, stream: Stream | None) -> None:
        """Break this stream off when it is time; None = there is none any more."""
        with self._lock:
            self._stream = stream
            if stream is not None and self._event.is_set():
                stream.abort()

    def sleep(self, seconds: float) -> None:
        """Wait, or be woken."""
        self._event.wait(seconds)


class ServerDownError(DataError):
    """A server was tried again and again, and gave nothing; perhaps it is the same with its other files."""


class StoppedError(Exception):
    """A download was ended by a :class:`Stop`."""


def persist(url: str, patience: Patience, attempt: Callable[[], T], stop: Stop) -> T:
    """Call ``attempt`` until it succeeds.

    The pause doubles up to half a minute, a random part of it left out so that many
    processes do not come back at once; a longer one that the server asks for is kept.

    Args:
        url: for the message.
        patience: when to give up.
        attempt: raises TransientError where it is worth another try.
        stop: ends the pauses.

    Raises:
        ServerDownError: it failed too often.
        DataError: it was refused. Both name the URL, what the server said and how often it was tried.
        StoppedError: it was stopped.
    """
    began, failed, tried = time.monotonic(), 0, 0
    while True:
        tried += 1
        try:
            return attempt()
        except RefusedError as error:
            raise DataError(_told(url, str(error), tried, began)) from error
        except TransientError as error:
            if stop:
                raise StoppedError from error
            failed = 1 if error.moved_on else failed + 1
            if failed >= patience.attempts:
                raise ServerDownError(_told(url, str(error), tried, began)) from error
            logger.log(
                logging.WARNING if failed >= _TOLD_FROM else logging.INFO,
                "%s: %s; trying again (%d of %d)",
                *(url, error, failed, patience.attempts - 1),
            )
            pause = min(LONGEST_WAIT_S, patience.first_pause * 2 ** (failed - 1)) * _jitter.uniform(0.5, 1.0)
            stop.sleep(max(pause, min(error.retry_after, LONGEST_ASKED_WAIT_S)))
        if stop:
            raise StoppedError


def _told(url: str, said: str, tried: int, began: float) -> str:
    times = "once" if tried == 1 else f"{tried} times in {time.monotonic() - began:.0f} s"
    return (
        f"{url}: cannot be fetched ({said}; tried {times}), expected a file that the server gives whole: "
        "check the address, the server and the network, then start the same command again"
    )
