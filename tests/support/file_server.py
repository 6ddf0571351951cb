"""A local http server of a folder that fails as it is told to, and remembers what it was asked for."""

import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[[int, str], str]
"""(number of the request, name of the file) -> one of the faults of ``_Handler``, or ""."""


class FileServer(ThreadingHTTPServer):
    """Serves ``folder``.

    Attributes:
        fault: says what goes wrong with a request.
        asked: (name, first byte, bytes of body sent) of each request.
        knows_ranges: whether a Range header counts.
        latency: seconds before each answer.
        rate: bytes/s of each answer; 0 = as fast as it goes.
        retry_after: header of an answer that is an error.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fault: Fault = lambda number, name: ""
        self.asked: list[tuple[str, int, int]] = []
        self.knows_ranges, self.latency, self.rate = True, 0.0, 0.0
        self.count, self.lock = 0, threading.Lock()
        self.retry_after = "0"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def sent(self, ending: str = ".tar") -> int:
        """Bytes of the bodies of files with that ending."""
        return sum(size for name, _, size in self.asked if name.endswith(ending))

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        server, name = self.server, self.path.lstrip("/")
        with server.lock:
            server.count += 1
            fault = server.fault(server.count, name)
        time.sleep(server.latency)
        if fault in ("404", "429", "500", "503"):
            self.send_response(int(fault))
            self.send_header("Retry-After", server.retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "reset":
            self._reset()
            return
        if fault == "stall":
            time.sleep(5)
            return
        if not (server.folder / name).is_file():
            self.send_error(404)
            return
        self._send((server.folder / name).read_bytes(), name, fault)

    def _send(self, content: bytes, name: str, fault: str) -> None:
        start, stop = self._range(len(content))
        body = content[start:stop]
        self.send_response(206 if (start, stop) != (0, len(content)) else 200)
        if (start, stop) != (0, len(content)):
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        with self.server.lock:
            self.server.asked.append((name, start, len(body)))
        if fault == "dribble":
            for byte in body[:100]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
            return
        self._write(body)

    def _write(self, body: bytes) -> None:
        if not self.server.rate:
            self.wfile.write(body)
            return
        piece = 1 << 15
        for place in range(0, len(body), piece):
            self.wfile.write(body[place : place + piece])
            time.sleep(piece / self.server.rate)

    def _range(self, length: int) -> tuple[int, int]:
        words = self.headers.get("Range", "")
        if not self.server.knows_ranges or not words.startswith("bytes="):
            return 0, length
        first, _, last = words.removeprefix("bytes=").partition("-")
        return int(first), min(length, int(last) + 1) if last else length

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()


@contextmanager
def serve(folder: Path) -> Iterator[FileServer]:
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve_copy(folder: Path, where: Path) -> Iterator[FileServer]:
    """A server of a copy of a folder, under the folder's name; the copy may be damaged."""
    copy = Path(shutil.copytree(folder, where / "served" / folder.name))
    with serve(copy.parent) as server:
        yield server
