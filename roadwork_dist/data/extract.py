"""Filling a feature store: every photo is decoded once, every view goes through the backbone once.

N views in one call of the backbone · V views of a photo · D width of the backbone · S side in px
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from roadwork_dist.common.errors import BackboneError, DataError
from roadwork_dist.common.random import torch_generator_for
from roadwork_dist.data.features import FeatureStore
from roadwork_dist.data.manifest import Sample
from roadwork_dist.data.photo import PhotoViews

Encoder = Callable[[Tensor], Tensor]
"""[N, 3, S, S] uint8 on the CPU -> [N, D] floating, on any device."""

Progress = Callable[[int, int], None]
"""Called with (entries done, entries to do) of this process; an entry is one copy of one photo."""


@dataclass(frozen=True)
class _Job:
    """Copies of one photo that are missing in the store."""

    row: int
    sample: Sample
    content: str
    copies: list[int | None]


@dataclass(frozen=True)
class Extraction:
    """What :func:`extract` did."""

    computed: int
    """Entries (photo and copy) computed now."""
    found: int
    """Entries that were there already."""
    unreadable: dict[int, str] = field(default_factory=dict)
    """Row of the manifest -> message, for photos of this process's share that could not be read (and
    rows with the same content); they have no features."""


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
    on_progress: Progress | None = None,
) -> Extraction:
    """Compute the features that the store lacks.

    What is there is not decoded again, so a run that was killed goes on where it was. Every call of
    ``encode`` gets exactly ``batch_views`` views (the last is filled up with black ones), so a
    feature does not depend on which photos stood beside it, nor on the point of resume.

    Args:
        samples: the photos.
        hashes: their content, as of :func:`content_hashes`.
        views: how a photo becomes views; its augmentation must be that of the store's space.
        store: where features go.
        encode: the frozen backbone.
        batch_views: views per call of ``encode``.
        workers: processes that decode while the backbone computes; 0 = decode in this process.
        share: (rank, world size): this process computes the photos of its rank only.
        on_progress: told after every entry.

    Raises:
        BackboneError: the backbone gave features that are not finite.
        OSError: the store cannot be written.
    """
    jobs, found, unreadable = _plan(samples, hashes, views, store, share)
    total = found + sum(len(job.copies) for job in jobs)
    done = found
    if on_progress is not None:
        on_progress(done, total)

    def readable() -> Iterator[tuple[tuple[_Job, int | None], Tensor]]:
        for job_index, copy, item in _decoded(jobs, views, workers):
            if isinstance(item, str):
                unreadable[jobs[job_index].row] = item
            else:
                yield (jobs[job_index], copy), item

    for (job, copy), features in _encode_in_batches(readable(), encode, batch_views):
        if not torch.isfinite(features).all():
            raise BackboneError(
                f"the backbone gave features that are not finite for {job.sample.image.name}: "
                "set backbone.dtype to fp32, or check the backbone's weights"
            )
        store.put(job.content, job.sample.id, copy, features)
        done += 1
        if on_progress is not None:
            on_progress(done, total)
    broken = {hashes[row]: message for row, message in unreadable.items() if hashes[row] is not None}
    unreadable |= {row: broken[content] for row, content in enumerate(hashes) if content in broken}
    return Extraction(done - found, found, dict(sorted(unreadable.items())))


def _plan(
    samples: Sequence[Sample],
    hashes: Sequence[str | None],
    views: PhotoViews,
    store: FeatureStore,
    share: tuple[int, int],
) -> tuple[list[_Job], int, dict[int, str]]:
    """What this process has to compute, how many entries are there, and photos without bytes.

    The shares are cut before looking at the store, which other processes are filling meanwhile.
    """
    unreadable: dict[int, str] = {}
    jobs: list[_Job] = []
    found = 0
    seen: set[object] = set()
    rank, world_size = share
    for row, (sample, content) in enumerate(zip(samples, hashes, strict=True)):
        entry = content if views.augmenter is None else (content, sample.id)
        if content is not None and entry in seen:
            continue  # the same photo under another id
        seen.add(entry)
        if row % world_size != rank:
            continue
        if content is None:
            unreadable[row] = _why_unreadable(sample)
            continue
        missing = [copy for copy in views.copies() if not store.has(content, sample.id, copy)]
        found += len(views.copies()) - len(missing)
        if missing:
            jobs.append(_Job(row, sample, content, missing))
    return jobs, found, unreadable


def _why_unreadable(sample: Sample) -> str:
    try:
        sample.image.read()
    except DataError as error:
        return str(error)
    return f"{sample.image.name}: changed while it was read: start the same command again"


class _Decoding(IterableDataset[Any]):
    """Decodes each photo once and gives its copies one by one; a worker takes every n-th photo."""

    def __init__(self, jobs: list[_Job], views: PhotoViews) -> None:
        self.jobs, self.views = jobs, views

    def __iter__(self) -> Iterator[tuple[int, int | None, Tensor | str]]:
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
                yield index, copy, self.views.augmented(plain, job.sample.id, copy)


def _decoded(
    jobs: list[_Job], views: PhotoViews, workers: int
) -> Iterable[tuple[int, int | None, Tensor | str]]:
    """(index of the job, copy, views or what is wrong with the photo)."""
    return DataLoader(
        _Decoding(jobs, views),
        batch_size=None,
        num_workers=min(workers, len(jobs)),
        generator=torch_generator_for("extract"),  # or it would draw from the global generator
    )


def _encode_in_batches(
    entries: Iterable[tuple[tuple[_Job, int | None], Tensor]], encode: Encoder, batch_views: int
) -> Iterator[tuple[tuple[_Job, int | None], Tensor]]:
    """Encode views of several photos together; gives each entry its features [V, D], in order."""
    waiting: deque[tuple[tuple[_Job, int | None], int]] = deque()
    views: Tensor | None = None  # not yet encoded
    features: Tensor | None = None  # encoded, not yet given out
    for key, new in entries:
        waiting.append((key, len(new)))
        views = new if views is None or not len(views) else torch.cat([views, new])
        while len(views) >= batch_views:
            encoded = encode(views[:batch_views])
            features = encoded if features is None else torch.cat([features, encoded])
            views = views[batch_views:]
        while features is not None and waiting and len(features) >= waiting[0][1]:
            key, count = waiting.popleft()
            yield key, features[:count]
            features = features[count:]
    if views is not None and len(views):
        filled = torch.cat([views, views.new_zeros((batch_views - len(views), *views.shape[1:]))])
        encoded = encode(filled)[: len(views)]
        features = encoded if features is None else torch.cat([features, encoded])
    while waiting and features is not None:
        key, count = waiting.popleft()
        yield key, features[:count]
        features = features[count:]
