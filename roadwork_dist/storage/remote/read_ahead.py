"""Background prefetching of the remote files that will be read next.

The order of rows is known in advance, so the order of their files is too: nothing is guessed.
"""

import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from roadwork_dist.common.errors import RoadworkError
from roadwork_dist.photos.images import ImageSource
from roadwork_dist.storage.remote.cache import RemoteCache
from roadwork_dist.storage.remote.download import RemoteFile
from roadwork_dist.storage.remote.retry import Stop, StoppedError

Item = TypeVar("Item", bound=tuple[Any, ...])

logger = logging.getLogger(__name__)

MOST_BATCHES = 10_000
"""Largest number of batches to look ahead, even if they use few files."""
MOST_CONNECTIONS = 4
_JOIN_S = 5.0


class Fetcher:
    """Fetches files in threads, first in first out, until it is closed.

    A file that cannot be fetched is skipped: the error is raised when it is read.

    Args:
        cache: cache that stores the files.
        threads: files fetched at once; several connections are often faster than one.
    """

    def __init__(self, cache: RemoteCache, threads: int) -> None:
        self._cache, self._stops = cache, [Stop() for _ in range(threads)]
        self._wanted: queue.SimpleQueue[RemoteFile | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=(stop,), daemon=True, name="read-ahead")
            for stop in self._stops
        ]
        for thread in self._threads:
            thread.start()

    def want(self, file: RemoteFile) -> None:
        """Queue a file."""
        self._wanted.put(file)

    def finish(self) -> None:
        """End the threads once the queue is empty; does not wait for them."""
        for _ in self._threads:
            self._wanted.put(None)

    def close(self) -> None:
        """Stop the current downloads, which can be resumed later, and end the threads."""
        for stop in self._stops:
            stop.set()
        self.finish()
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _work(self, stop: Stop) -> None:
        while (file := self._wanted.get()) is not None and not stop:
            try:
                self._cache.fetch_unless_busy(file, stop)
            except StoppedError:
                return
            except (RoadworkError, OSError) as error:
                logger.debug("read-ahead: %s", error)


def read_ahead_of(images: Sequence[ImageSource], batches: Iterable[list[int]]) -> Iterable[list[int]]:
    """Pass batches of rows through while prefetching the files of upcoming images.

    Args:
        images: the image of each row; those on a server have a ``file`` and a ``cache``.
        batches: row numbers of each batch.

    Returns:
        The batches.
    """
    cache: RemoteCache | None = next((c for i in images if (c := getattr(i, "cache", None))), None)
    if cache is None or not cache.read_ahead:
        return batches
    return read_ahead(batches, lambda row: getattr(images[row], "file", None), cache, cache.read_ahead)


def fetch_alongside(images: Sequence[ImageSource], items: Iterable[Item]) -> Iterator[Item]:
    """Pass items made from images through, while prefetching the files of upcoming images.

    Args:
        images: the images, in reading order.
        items: each starts with the index of its image, in ascending order; an image may have several items.

    Yields:
        The items.
    """
    coming = iter(items)  # loader processes start here, before a thread does
    ahead = iter(read_ahead_of(images, ([number] for number in range(len(images)))))
    next(ahead, None)
    reached = 0
    for item in coming:
        for _ in range(reached, item[0]):
            next(ahead, None)
        reached = max(reached, item[0])
        yield item


def read_ahead(
    batches: Iterable[list[int]],
    file_of: Callable[[int], RemoteFile | None],
    cache: RemoteCache,
    files: int,
) -> Iterator[list[int]]:
    """Pass batches of rows through unchanged while prefetching the files of upcoming batches.

    Args:
        batches: row numbers of each batch.
        file_of: the file of a row; None = it needs no fetching.
        cache: cache that stores the files.
        files: number of unread files to prefetch.

    Yields:
        The batches.
    """
    fetcher = Fetcher(cache, min(files, MOST_CONNECTIONS))
    coming: deque[tuple[list[int], list[RemoteFile]]] = deque()
    left: Counter[RemoteFile] = Counter()  # upcoming batches that read from a file
    unread: set[RemoteFile] = set()  # files that no yielded batch reads from
    source = iter(batches)
    try:
        while True:
            while len(unread) < files and len(coming) < MOST_BATCHES:
                batch = next(source, None)
                if batch is None:
                    break
                own = list(dict.fromkeys(file for row in batch if (file := file_of(row)) is not None))
                coming.append((batch, own))
                for file in own:
                    if not left[file]:
                        unread.add(file)
                        fetcher.want(file)
                    left[file] += 1
            if not coming:
                # All are queued. The batches of a loader with worker processes are read later than yielded.
                fetcher.finish()
                return
            batch, own = coming.popleft()
            for file in own:
                unread.discard(file)
                left[file] -= 1
            yield batch
    except BaseException:  # mainly GeneratorExit: the rest will not be read
        fetcher.close()
        raise
