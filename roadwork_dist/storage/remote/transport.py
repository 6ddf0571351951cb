"""Streams bytes of a URL from an offset: http(s) with the standard library, other schemes with fsspec.

The http code uses no event loop. Its streams work both in threads and in forked loader processes, respect
a socket timeout, and can be aborted from another thread.
"""

import http.client
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import urlsplit

from roadwork_dist.common.errors import MissingDependencyError

_PASSING_STATUS = {408, 425, 429}
"""HTTP statuses below 500 for which a retry may help."""
BLOCK = 8 << 20
"""Bytes per request through fsspec."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


class TransientError(Exception):
    """A request failed in a way that a retry may fix.

    Args:
        text: error of the server or the network.
        retry_after: seconds to wait, as requested by the server.
        moved_on: enough bytes were received to restart the count of attempts.
    """

    def __init__(self, text: str, *, retry_after: float = 0.0, moved_on: bool = False) -> None:
        super().__init__(text)
        self.retry_after, self.moved_on = retry_after, moved_on


class RefusedError(Exception):
    """A request failed permanently: no such file, no permission, or not the expected file."""


class Stream(Protocol):
    """Bytes of a URL, read piece by piece."""

    start: int
    """Offset of the first byte: as requested, or 0 if the server does not support range requests."""

    @property
    def total(self) -> int | None:
        """Size of the whole file in bytes; None if the server does not report it."""

    def read(self, size: int) -> bytes:
        """The next piece, at most ``size`` bytes; b"" at the end.

        Raises:
            TransientError: the connection broke or timed out.
        """

    def abort(self) -> None:
        """Abort from another thread: a blocked ``read`` ends at once."""


@contextmanager
def open_at(url: str, start: int = 0, stop: int | None = None, *, timeout: float) -> Iterator[Stream]:
    """Open a URL at an offset.

    Args:
        url: http(s), or any scheme that fsspec supports.
        start: first byte.
        stop: byte after the last one; None = to the end.
        timeout: seconds to wait for a connection and for each piece (http).

    Raises:
        TransientError: a retry may help.
        RefusedError: a retry will not help.
        MissingDependencyError: the package for this URL scheme is not installed.
    """
    opener = _open_http if is_http(url) else _open_fsspec
    stream = opener(url, start, stop, timeout)
    try:
        yield stream
    finally:
        stream.close()


def is_http(url: str) -> bool:
    """Whether a URL is fetched with the standard library."""
    return urlsplit(url).scheme in ("http", "https")


class _HttpStream:
    def __init__(self, response: Any, start: int, total: int | None) -> None:
        self._response, self.start, self.total = response, start, total

    def read(self, size: int) -> bytes:
        try:
            # read1 returns what has arrived; read would wait for all, even at a byte per second.
            data: bytes = self._response.read1(size)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise TransientError(_text(error)) from error
        return data

    def abort(self) -> None:
        try:
            with socket.socket(fileno=socket.dup(self._response.fileno())) as twin:
                twin.shutdown(socket.SHUT_RDWR)
        except (OSError, ValueError):  # already closed
            return

    def close(self) -> None:
        self._response.close()


def _open_http(url: str, start: int, stop: int | None, timeout: float) -> _HttpStream:
    headers = {"Accept-Encoding": "identity", "User-Agent": "roadwork-dist"}
    if start or stop is not None:
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        text = f"the server answered {error.code} {error.reason}"
        wait = _seconds(error.headers.get("Retry-After"))
        error.close()
        if error.code >= 500 or error.code in _PASSING_STATUS:
            raise TransientError(text, retry_after=wait) from None
        raise RefusedError(text) from None
    except (http.client.InvalidURL, ValueError) as error:
        raise RefusedError(_text(error)) from error
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise TransientError(_text(error)) from error
    if response.status == http.client.PARTIAL_CONTENT:
        first, total = _range(response.headers.get("Content-Range", ""))
        if first not in (None, start):
            response.close()
            raise TransientError(f"the server sent bytes from {first:,} instead of from {start:,}")
        return _HttpStream(response, start, total)
    return _HttpStream(response, 0, response.length)


def _range(content_range: str) -> tuple[int | None, int | None]:
    """``bytes 5-9/100`` -> 5 and 100 (RFC 9110, 14.4)."""
    numbers = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range.strip())
    if numbers is None:
        return None, None
    return int(numbers[1]), None if numbers[2] == "*" else int(numbers[2])


def _seconds(retry_after: str | None) -> float:
    """``Retry-After`` is a number of seconds or a date (RFC 9110, 10.2.3)."""
    if not retry_after:
        return 0.0
    try:
        if retry_after.strip().isdigit():
            return float(retry_after)
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def _text(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return "the server did not answer in time"
    return " ".join(str(reason).split()) or type(reason).__name__


class _FileStream:
    """A file read through fsspec in blocks of one request each, whatever the file system prefetches."""

    def __init__(self, system: Any, path: str, start: int, stop: int | None) -> None:
        self._system, self._path, self.start, self._stop = system, path, start, stop
        self._place, self._block = start, b""

    @property
    def total(self) -> int | None:
        size: int | None = self._call(self._system.size, self._path)
        return size

    def read(self, size: int) -> bytes:
        if self._stop is None:
            self._stop = self.total  # object stores reject reads past the end
        if not self._block:
            end = self._place + BLOCK if self._stop is None else min(self._stop, self._place + BLOCK)
            if end <= self._place:
                return b""
            self._block = self._call(self._system.cat_file, self._path, start=self._place, end=end)
            self._place += len(self._block)
        piece, self._block = self._block[:size], self._block[size:]
        return piece

    def abort(self) -> None:
        """Do nothing: these requests end by their library's timeouts."""

    def close(self) -> None:
        """Do nothing, since nothing is open."""

    def _call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except FileNotFoundError as error:
            raise RefusedError("there is no such file") from error
        except PermissionError as error:
            raise RefusedError(f"permission denied: {_text(error)}") from error
        except Exception as error:  # each file system has its own exceptions
            raise TransientError(_text(error)) from error


def _open_fsspec(url: str, start: int, stop: int | None, timeout: float) -> _FileStream:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise _missing(url, error) from error
    return _FileStream(system, path, start, stop)


def _missing(url: str, error: Exception) -> MissingDependencyError:
    scheme = urlsplit(url).scheme
    extra = _EXTRAS.get(scheme)
    what = f"`pip install 'roadwork-dist[{extra}]'`" if extra else "the package that fsspec asks for"
    return MissingDependencyError(
        f"{url}: {scheme}:// cannot be read here ({_text(error)}), expected http(s):// or a scheme "
        f"whose package is installed: install {what}"
    )
