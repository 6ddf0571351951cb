"""Bytes of a URL from a place on: http(s) by the standard library, all other kinds of URL by fsspec.

http goes without an event loop: its streams work in threads and in forked loader processes alike, end at a
timeout of their socket, and can be broken off by another thread.
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
"""Besides all of 500 and above: what another try may mend."""
BLOCK = 8 << 20
"""Bytes of a request through fsspec."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


class TransientError(Exception):
    """A request failed in a way that another try may mend.

    Args:
        text: what the server or the network said.
        retry_after: seconds that the server asked to wait for.
        moved_on: so much was got before that the tries count from the start again.
    """

    def __init__(self, text: str, *, retry_after: float = 0.0, moved_on: bool = False) -> None:
        super().__init__(text)
        self.retry_after, self.moved_on = retry_after, moved_on


class RefusedError(Exception):
    """A request failed for good: no such file, no right to read it, or another file than expected."""


class Stream(Protocol):
    """Bytes of a URL, one piece after another."""

    start: int
    """Where in the file they begin: what was asked for, or 0 from a server that knows no ranges."""

    @property
    def total(self) -> int | None:
        """Bytes of the whole file, where the server tells them."""

    def read(self, size: int) -> bytes:
        """The next piece, at most ``size`` bytes; b"" at the end.

        Raises:
            TransientError: the connection broke, or nothing came in time.
        """

    def abort(self) -> None:
        """Break it off, from another thread: its ``read`` ends at once."""


@contextmanager
def open_at(url: str, start: int = 0, stop: int | None = None, *, timeout: float) -> Iterator[Stream]:
    """Open a URL at a place.

    Args:
        url: http(s), or any kind that fsspec knows.
        start: first byte.
        stop: byte behind the last one; None = to the end.
        timeout: seconds to wait for a connection and for each piece (http).

    Raises:
        TransientError: another try may help.
        RefusedError: another try will not.
        MissingDependencyError: the package for this kind of URL is not installed.
    """
    opener = _open_http if is_http(url) else _open_fsspec
    stream = opener(url, start, stop, timeout)
    try:
        yield stream
    finally:
        stream.close()


def is_http(url: str) -> bool:
    """Whether the standard library fetches a URL."""
    return urlsplit(url).scheme in ("http", "https")


class _HttpStream:
    def __init__(self, response: Any, start: int, total: int | None) -> None:
        self._response, self.start, self.total = response, start, total

    def read(self, size: int) -> bytes:
        try:
            # read1: what has come, instead of waiting for all from a server that sends a byte a second.
            data: bytes = self._response.read1(size)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise TransientError(_text(error)) from error
        return data

    def abort(self) -> None:
        try:
            with socket.socket(fileno=socket.dup(self._response.fileno())) as twin:
                twin.shutdown(socket.SHUT_RDWR)
        except (OSError, ValueError):  # it has ended by itself
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
            raise TransientError(f"the server gave bytes from {first:,} on instead of {start:,}")
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
    """A file of fsspec, asked for in blocks: each is one request, however the file system reads ahead."""

    def __init__(self, system: Any, path: str, start: int, stop: int | None) -> None:
        self._system, self._path, self.start, self._stop = system, path, start, stop
        self._place, self._block = start, b""

    @property
    def total(self) -> int | None:
        size: int | None = self._asked(self._system.size, self._path)
        return size

    def read(self, size: int) -> bytes:
        if self._stop is None:
            self._stop = self.total  # behind the end, an object store gives an error
        if not self._block:
            end = self._place + BLOCK if self._stop is None else min(self._stop, self._place + BLOCK)
            if end <= self._place:
                return b""
            self._block = self._asked(self._system.cat_file, self._path, start=self._place, end=end)
            self._place += len(self._block)
        piece, self._block = self._block[:size], self._block[size:]
        return piece

    def abort(self) -> None:
        """Nothing: these requests end by the timeouts of their own library."""

    def close(self) -> None:
        """Nothing is open."""

    def _asked(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except FileNotFoundError as error:
            raise RefusedError("there is no such file") from error
        except PermissionError as error:
            raise RefusedError(f"it may not be read: {_text(error)}") from error
        except Exception as error:  # each file system raises its own
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
        f"{url}: {scheme}:// cannot be read here ({_text(error)}), expected http(s):// or a kind of URL "
        f"whose package is installed: install {what}"
    )
