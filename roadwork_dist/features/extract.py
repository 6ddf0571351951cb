"""Compute the features of a frozen backbone and write them to a feature store.

N views in one call of the backbone · V views of a photo · D width of the backbone · S side in px
"""

import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from roadwork_dist.common.errors import BackboneError, DataError, RoadworkError
from roadwork_dist.common.random import torch_generator_for
from roadwork_dist.features.store import FeatureStore
from roadwork_dist.photos.augment.batched import ViewDraws, augmented_on_device
from roadwork_dist.photos.manifest import Sample
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.storage.remote.read_ahead import fetch_alongside

logger = logging.getLogger(__name__)

Encoder = Callable[[Tensor], Tensor]
"""[N, 3, S, S] uint8 on the CPU -> [N, D] floating point, on any device."""

_BUFFERS = 3
"""Batches of views being filled or copied to a GPU."""
_MAX_PENDING_WRITES = 4
"""Batches of features that may wait to be written."""
_BLOCK = 256
"""Neighbouring photos assigned to one process."""
_MIN_SHARDS_PER_RANK = 4
"""With at least this many shards per process, whole shards are assigned."""

Progress = Callable[[int, int], None]
"""Called with (entries done, entries to do) of this process; an entry is one copy of one photo."""


@dataclass(frozen=True)
class _Job:
    """Copies of one photo that are missing from the store."""

    row: int
    sample: Sample
    content: str
    copies: list[int | None]


_Entry = tuple[_Job, int | None]
_Item = tuple[Tensor, list[ViewDraws]]
"""Views of a copy, and the draws of each for augmentation on the device (empty if already augmented)."""


@dataclass(frozen=True)
class Extraction:
    """Result of :func:`extract`."""

    computed: int
    """Entries (photo and copy) computed in this call."""
    found: int
    """Entries that were already stored."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """Row of the manifest -> error message, for photos of this process's share that could not be read
    (and rows with the same content); they have no features."""


def extract(
    samples: Sequence[Sample],
    hashes: Sequence[str | None],
    *,
    views: PhotoViews,
    store: FeatureStore,
    encode: Encoder,
    batch_views: int = 48,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
    augment_on: torch.device | None = None,
    on_progress: Progress | None = None,
) -> Extraction:
    """Compute the features that the store lacks, and close it.

    Every photo is decoded once and every view goes through the backbone once. Stored entries are
    skipped, so a killed run resumes where it stopped. Every call of ``encode`` gets exactly
    ``batch_views`` views (the last batch is padded with black views), so a feature depends neither on
    the other photos of its batch nor on the point of resume.

    Decoding (in loader processes), computing (here) and writing (in a thread) run in parallel; on a
    GPU only the writing thread waits for the device.

    Args:
        samples: the photos.
        hashes: their content hashes, from :func:`content_hashes`.
        views: how a photo is cut into views; its augmentation must be that of the store's space.
        store: where features are written.
        encode: the frozen backbone.
        batch_views: views per call of ``encode``.
        workers: processes that decode while the backbone computes; 0 = decode in this process.
        share: (rank, world size): this process computes the photos of its rank only.
        augment_on: device that augments the views, in the batches of ``encode``; None = the loader
            processes. Draws are the same; a few values are rounded differently.
        on_progress: called after every entry.

    Raises:
        BackboneError: the backbone returned features that are not finite.
        ConfigError: the store cannot be written.
    """
    store.check()
    jobs, found, unreadable = _plan(samples, hashes, views, store, share)
    total = found + sum(len(job.copies) for job in jobs)
    done = found
    if on_progress is not None:
        on_progress(done, total)

    views = replace(views, on_device=augment_on is not None)

    def readable() -> Iterator[tuple[_Entry, _Item]]:
        for job_index, copy, item in _decoded(jobs, views, workers):
            if isinstance(item, str):
                unreadable[jobs[job_index].row] = item
            else:
                yield (jobs[job_index], copy), item

    try:
        compute = _augment_and_encode(encode, augment_on)
        for written in _encode_and_write(readable(), compute, _FeatureWriter(store), batch_views):
            if done == found and written:
                _warn_if_disk_too_small(store, total - done, views.geometry.max_views)
            for _ in range(written):
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
    except BaseException:
        with suppress(RoadworkError):  # the first error is the one to report
            store.close()
        raise
    store.close()
    broken = {hashes[row]: message for row, message in unreadable.items() if hashes[row] is not None}
    unreadable |= {row: broken[content] for row, content in enumerate(hashes) if content in broken}
    return Extraction(done - found, found, dict(sorted(unreadable.items())))


def _warn_if_disk_too_small(store: FeatureStore, entries: int, views: int) -> None:
    """Warn in advance, rather than fail hours later, if the disk lacks space for this process's features."""
    most = entries * views * store.view_bytes
    free = shutil.disk_usage(store.folder).free
    if most > free:
        logger.warning(
            "the features of %d photos and copies take up to %.1f GB, but the disk of %s has %.1f GB free: "
            "free up space during the run, or stop and set features.dir to another folder",
            *(entries, most / 1e9, store.folder, free / 1e9),
        )


def _plan(
    samples: Sequence[Sample],
    hashes: Sequence[str | None],
    views: PhotoViews,
    store: FeatureStore,
    share: tuple[int, int],
) -> tuple[list[_Job], int, dict[int, str]]:
    """Jobs of this process, number of entries already stored, and messages of unreadable photos by row.

    Shares are assigned before looking at the store, since other processes are filling it at the same time.
    """
    unreadable: dict[int, str] = {}
    rows: list[int] = []
    seen: set[object] = set()
    is_own = _share_of(samples, *share)
    for row, (sample, content) in enumerate(zip(samples, hashes, strict=True)):
        entry = content if views.augmenter is None else (content, sample.id)
        if content is not None and entry in seen:
            continue  # the same photo under another id
        seen.add(entry)
        if not is_own[row]:
            continue
        if content is None:
            unreadable[row] = _why_unreadable(sample)
        else:
            rows.append(row)
    contents, ids = [str(hashes[row]) for row in rows], [samples[row].id for row in rows]
    copies = views.copies()
    present = [store.present(contents, ids, copy).tolist() for copy in copies]
    jobs: list[_Job] = []
    for number, row in enumerate(rows):
        missing = [copy for copy, is_there in zip(copies, present, strict=True) if not is_there[number]]
        if missing:
            jobs.append(_Job(row, samples[row], contents[number], missing))
    found = len(rows) * len(copies) - sum(len(job.copies) for job in jobs)
    return jobs, found, unreadable


def _share_of(samples: Sequence[Sample], rank: int, world_size: int) -> list[bool]:
    """Which rows belong to this rank: whole shards if there are enough of them, else blocks of neighbours.

    They are assigned round-robin, so that after a kill every rank still has work left.
    """
    shards = [getattr(sample.image, "location", None) for sample in samples]
    begins = [row == 0 or shards[row] != shards[row - 1] for row in range(len(shards))]
    if None not in shards and sum(begins) >= _MIN_SHARDS_PER_RANK * world_size:
        return [(number - 1) % world_size == rank for number in accumulate(begins)]
    block = min(_BLOCK, max(1, len(samples) // (world_size * 16)))
    return [row // block % world_size == rank for row in range(len(samples))]


def _why_unreadable(sample: Sample) -> str:
    try:
        sample.image.read()
    except DataError as error:
        return str(error)
    return f"{sample.image.name}: changed while it was being read: start the same command again"


class _DecodingDataset(IterableDataset[Any]):
    """Decodes each photo once and yields its copies one by one; each worker takes every n-th photo."""

    def __init__(self, jobs: list[_Job], views: PhotoViews) -> None:
        self.jobs, self.views = jobs, views

    def __iter__(self) -> Iterator[tuple[int, int | None, _Item | str]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, len(self.jobs), step):
            job = self.jobs[index]
            try:
                plain = self.views.plain(job.sample.image)
            except DataError as error:
                yield index, None, str(error)
                continue
            for copy in job.copies:
                if self.views.on_device:
                    yield index, copy, (plain, self.views.draws(plain, job.sample.id, copy))
                else:
                    yield index, copy, (self.views.augmented(plain, job.sample.id, copy), [{}] * len(plain))


def _decoded(
    jobs: list[_Job], views: PhotoViews, workers: int
) -> Iterable[tuple[int, int | None, _Item | str]]:
    """(index of the job, copy, views and their draws, or why the photo cannot be read)."""
    loader = DataLoader(
        _DecodingDataset(jobs, views),
        batch_size=None,
        num_workers=min(workers, len(jobs)),
        generator=torch_generator_for("extract"),  # otherwise it draws from the global generator
    )
    return fetch_alongside([job.sample.image for job in jobs], loader)


class _FeatureWriter:
    """Splits the features of batches into entries, in order, and writes them to the store."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._entries: deque[tuple[_Entry, int]] = deque()
        self._features: Tensor | None = None  # of an entry that is not complete yet

    def __call__(
        self, entries: list[tuple[_Entry, int]], features: Tensor, ready: "torch.cuda.Event | None"
    ) -> int:
        """Write the entries that are complete.

        Args:
            entries: entries whose first view is in this batch, with their number of views.
            features: features of the batch, [N, D] on the CPU.
            ready: event recorded on the device after the copy to the CPU.

        Returns:
            Number of entries written.
        """
        if ready is not None:
            ready.synchronize()
        self._entries.extend(entries)
        rest = features if self._features is None else torch.cat([self._features, features])
        written = 0
        while self._entries and len(rest) >= self._entries[0][1]:
            (job, copy), count = self._entries.popleft()
            if not torch.isfinite(rest[:count]).all():
                raise BackboneError(
                    f"the backbone returned features that are not finite for {job.sample.image.name}: "
                    "set backbone.dtype to fp32, or check the backbone's weights"
                )
            self.store.put(job.content, job.sample.id, copy, rest[:count])
            rest, written = rest[count:], written + 1
        self._features = rest.clone()  # a slice would keep the whole batch
        return written


_Compute = Callable[[Tensor, list[ViewDraws]], Tensor]
"""Views of a batch [N, 3, S, S] on the CPU and the draws of each -> features [N, D]."""


def _augment_and_encode(encode: Encoder, device: torch.device | None) -> _Compute:
    def compute(views: Tensor, draws: list[ViewDraws]) -> Tensor:
        if device is None:
            return encode(views)
        return encode(augmented_on_device(views.to(device, non_blocking=True), draws))

    return compute


def _encode_and_write(
    entries: Iterable[tuple[_Entry, _Item]], compute: _Compute, write: _FeatureWriter, batch_views: int
) -> Iterator[int]:
    """Encode views in batches across photos and write them; yields the numbers of entries written."""
    written: deque[Future[int]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="features") as thread:
        for begun, buffer, views in _batches(entries, batch_views):
            features, ready = _to_host(
                compute(buffer.views, buffer.draws), views, write.store.space.torch_dtype
            )
            buffer.in_use(ready)
            written.append(thread.submit(write, begun, features, ready))
            while len(written) > _MAX_PENDING_WRITES or (written and written[0].done()):
                yield written.popleft().result()
        while written:
            yield written.popleft().result()


def _to_host(features: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, "torch.cuda.Event | None"]:
    """Start copying the first ``count`` features of a batch, in the stored dtype, to the CPU."""
    features = features.detach()[:count].to(dtype)
    if features.device.type != "cuda":
        return features.to("cpu", copy=True), None
    host = torch.empty(features.shape, dtype=dtype, pin_memory=True)
    host.copy_(features, non_blocking=True)
    ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record()
    return host, ready


class _Buffer:
    """Views of one batch, in pinned memory if they are copied to a GPU."""

    def __init__(self, shape: Sequence[int], *, pinned: bool) -> None:
        self.views = torch.empty(tuple(shape), dtype=torch.uint8, pin_memory=pinned)
        self.draws: list[ViewDraws] = [{} for _ in self.views]
        self.pinned = pinned
        self.is_on_gpu = False
        self._ready: torch.cuda.Event | None = None

    def in_use(self, ready: "torch.cuda.Event | None") -> None:
        """Set the event to wait for before the buffer is filled again."""
        self._ready = ready
        self.is_on_gpu = self.is_on_gpu or ready is not None

    def wait(self) -> None:
        """Wait until the device has read the buffer."""
        if self._ready is not None:
            self._ready.synchronize()


def _batches(
    entries: Iterable[tuple[_Entry, _Item]], batch_views: int
) -> Iterator[tuple[list[tuple[_Entry, int]], _Buffer, int]]:
    """Batches of exactly ``batch_views`` views: entries that begin in it, buffer, number of real views."""
    ring: deque[_Buffer] = deque()
    begun: list[tuple[_Entry, int]] = []
    buffer: _Buffer | None = None
    filled = 0
    for entry, (views, draws) in entries:
        begun.append((entry, len(views)))
        start = 0
        while start < len(views):
            if buffer is None:
                buffer = _next_buffer(ring, (batch_views, *views.shape[1:]))
            part = views[start : start + batch_views - filled]
            buffer.views[filled : filled + len(part)].copy_(part)
            buffer.draws[filled : filled + len(part)] = draws[start : start + len(part)]
            start, filled = start + len(part), filled + len(part)
            if filled == batch_views:
                yield begun, buffer, filled
                begun, buffer, filled = [], None, 0
    if buffer is not None:
        buffer.views[filled:].zero_()
        buffer.draws[filled:] = [{}] * (batch_views - filled)
        yield begun, buffer, filled


def _next_buffer(ring: deque[_Buffer], shape: Sequence[int]) -> _Buffer:
    """A buffer that is not being read: always the same one for a CPU, the oldest of a few for a GPU."""
    is_on_gpu = bool(ring) and ring[-1].is_on_gpu
    if is_on_gpu and not ring[-1].pinned:
        ring.clear()  # the first one was created before the device of the backbone was known
    if not ring or (is_on_gpu and len(ring) < _BUFFERS):
        ring.append(_Buffer(shape, pinned=is_on_gpu))
        return ring[-1]
    ring.rotate(-1)
    ring[-1].wait()
    return ring[-1]
