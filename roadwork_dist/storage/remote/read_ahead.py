"""Files that reading will need next, fetched in the background.

Which rows come when is known beforehand, so which files they lie in is known as well: nothing is guessed.
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
"""Batches looked ahead at most, however few files they lie in."""
MOST_CONNECTIONS = 4
_JOIN_S = 5.0


class Fetcher:
    """Fetches files in threads, those wanted first first, until it is closed.

    A file that cannot be fetched is passed over: whoever reads it meets the error.

    Args:
        cache: where they go.
        threads: files fetched at once, as many connections often are faster than one.
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
        """Fetch a file, after those that were wanted before."""
        self._wanted.put(file)

    def finish(self) -> None:
        """Fetch what is wanted by now, and then end the threads; does not wait for that."""
        for _ in self._threads:
            self._wanted.put(None)

    def close(self) -> None:
        """End the downloads at hand, which later ones go on with, and the threads."""
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
    """Pass batches of rows on, while the files that the coming rows' pictures lie in are fetched.

    Args:
        images: the picture of each row; those on a server have a ``file`` and a ``cache``.
        batches: row numbers of each batch.

    Returns:
        The batches.
    """
    cache: RemoteCache | None = next((c for i in images if (c := getattr(i, "cache", None))), None)
    if cache is None or not cache.read_ahead:
        return batches
    return read_ahead(batches, lambda row: getattr(images[row], "file", None), cache, cache.read_ahead)


def fetch_alongside(images: Sequence[ImageSource], items: Iterable[Item]) -> Iterator[Item]:
    """Pass on what is made of pictures in their order, while the files of the coming pictures are fetched.

    Args:
        images: the pictures, in the order in which they are read.
        items: begin with the number of their picture; several may come of one.

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
    """Pass batches of rows on as they are, while the files of the coming ones are fetched.

    Args:
        batches: row numbers of each batch.
        file_of: the file that a row lies in; None = it needs no fetching.
        cache: where they go.
        files: so many files that reading has not reached are fetched, or asked for.

    Yields:
        The batches.
    """
    fetcher = Fetcher(cache, min(files, MOST_CONNECTIONS))
    coming: deque[tuple[list[int], list[RemoteFile]]] = deque()
    left: Counter[RemoteFile] = Counter()  # coming batches that read from a file
    unread: set[RemoteFile] = set()  # files that no batch passed on has read from
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
                # All is asked for, but a loader with several processes asks long before it reads.
                fetcher.finish()
                return
            batch, own = coming.popleft()
            for file in own:
                unread.discard(file)
                left[file] -= 1
            yield batch
    except BaseException:  # above all GeneratorExit: nobody will read the rest
        fetcher.close()
        raise
