"""Photos from a server in shard order, against webdataset's own pipeline over the same URLs.

A server in its own process sends shards of synthetic photos, with a fixed latency per request and a fixed
rate per connection. Both methods return the bytes of photos: ours with one loader process that prefetches
over two connections; webdataset with one connection in each loader process. The consumer does nothing, or
waits for the duration of a step per photo. Methods take turns; ours starts each turn with an empty cache.

    python benchmarks/data_remote.py
"""

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from measuring import Times, alternate, heading, median_and_spread, ratios
from PIL import Image
from torch.utils.data import DataLoader

from roadwork_dist.config.experiment import DataConfig, RemoteConfig
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.sources import load_manifest
from roadwork_dist.sources.shard_order import shard_order_of
from roadwork_dist.storage.remote.read_ahead import read_ahead_of
from roadwork_dist.storage.shards.plan import ShardOptions
from roadwork_dist.storage.shards.write import write_shards
from roadwork_dist.trainer.feed.loader import load_batches
from roadwork_dist.trainer.feed.sampler import Sampler

BATCH = 16
PIECE = 1 << 16


@dataclass(frozen=True)
class Link:
    """Simulated network between the server and its readers."""

    latency: float
    """Seconds before each answer."""
    rate: float
    """Bytes/s of each connection."""


class _Slow(SimpleHTTPRequestHandler):
    """Files of a folder, whole or by ranges, over the link."""

    link: Link
    sent: Any
    """Bytes of tars so far; shared with the process that measures."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        time.sleep(self.link.latency)
        path = Path(self.translate_path(self.path))
        content = path.read_bytes()
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        start, stop = int(first or 0), int(last) + 1 if last else len(content)
        body = content[start:stop]
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        due = time.perf_counter()
        for place in range(0, len(body), PIECE):
            try:
                self.wfile.write(body[place : place + PIECE])
            except OSError:  # the reader has closed the connection
                return
            if path.suffix == ".tar":
                with self.sent.get_lock():
                    self.sent.value += len(body[place : place + PIECE])
            due += PIECE / self.link.rate
            time.sleep(max(0.0, due - time.perf_counter()))


def _run_server(folder: Path, link: Link, sent: Any, port: Any) -> None:
    os.chdir(folder)
    _Slow.link, _Slow.sent = link, sent
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Slow)
    server.daemon_threads = True
    port.value = server.server_port
    server.serve_forever()


@contextmanager
def served(folder: Path, link: Link) -> Iterator[tuple[str, Any]]:
    """URL of a folder on a server in its own process, and the counter of the bytes that it sent."""
    context = multiprocessing.get_context("fork")
    sent, port = context.Value("q", 0), context.Value("i", 0)
    process = context.Process(target=_run_server, args=(folder, link, sent, port), daemon=True)
    process.start()
    while not port.value:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port.value}", sent
    finally:
        process.terminate()
        process.join()


def write_set(folder: Path, photos: int, side: int, per_shard: int) -> Path:
    """Shards of noise, stored as JPEG."""
    loose = folder / "loose"
    loose.mkdir(parents=True)
    generator = np.random.default_rng(0)
    lines = ["id,image,label"]
    for number in range(photos):
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(loose / f"{number}.jpg", quality=90)
        lines.append(f"{number},{number}.jpg,{number % 2}")
    (loose / "table.csv").write_text("\n".join(lines) + "\n")
    size = int((loose / "0.jpg").stat().st_size * (per_shard + 0.5) + 1024 * 3 * per_shard)
    manifest = load_manifest(str(loose / "table.csv"), DataConfig(), name="train")
    write_shards(manifest, folder / "shards", ShardOptions(size=size))
    return folder / "shards"


class Bytes:
    """Rows of a manifest as encoded photos, with prefetching."""

    pure = True

    def __init__(self, manifest: Manifest) -> None:
        self.images = [sample.image for sample in manifest]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> bytes:
        return self.images[row].read()

    def read_ahead(self, batches: Iterable[list[int]]) -> Iterable[list[int]]:
        """As in ``RoadworkDataset``."""
        return read_ahead_of(self.images, batches)


def own_batches(url: str, cache: Path, start: int = 0) -> Iterable[list[bytes]]:
    """Batches of an epoch from step ``start`` on, in shard order, with one loader process."""
    data = DataConfig(remote=RemoteConfig(cache_dir=str(cache)))
    manifest = load_manifest(url, data, name="train")
    rows = Bytes(manifest)
    sampler = Sampler(len(rows), BATCH, seed=1, shard_order=shard_order_of(rows.images, data))
    indices = (micro.indices for micros in sampler.steps(0, start) for micro in micros)
    return load_batches(rows, indices, workers=1, collate=list)


def webdataset_batches(url: str, shards: int, connections: int) -> Iterable[list[bytes]]:
    """The same photos through webdataset: shuffled shards, a shuffle buffer, one connection per process."""
    import webdataset as wds

    urls = f"{url}/shard-{{000000..{shards - 1:06d}}}.tar"
    pipeline = wds.WebDataset(urls, shardshuffle=shards, seed=1, empty_check=False)
    rows = pipeline.shuffle(4 * BATCH).to_tuple("jpg").batched(BATCH, collation_fn=list)
    return DataLoader(rows, batch_size=None, num_workers=connections)


def take(batches: Iterable[list[Any]], pause: float, most: int | None = None) -> int:
    """Consume batches, waiting ``pause`` seconds per photo; returns the number of photos."""
    photos = 0
    for number, batch in enumerate(batches):
        photos += len(batch)
        time.sleep(pause * len(batch))
        if number + 1 == most:
            break
    return photos


def speed_table(folder: Path, url: str, photos: int, pauses: list[float], turns: int) -> str:
    """Photos/s of a first epoch from the server, and of a second one from the cache."""
    shards = len(list(folder.glob("shards/*.tar")))
    cache = folder / "cache"

    def first() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        assert take(own_batches(url, cache), pause) == photos

    def again() -> None:
        assert take(own_batches(url, cache), pause) == photos

    def webdataset(connections: int) -> None:
        assert take(webdataset_batches(url, shards, connections), pause) == photos

    ways = {
        "ours, empty cache": first,
        "ours, second epoch": again,
        "webdataset": partial(webdataset, 1),
        "webdataset, two processes": partial(webdataset, 2),
    }
    lines = [
        "| a photo takes its step | way | photos/s, median | IQR | of webdataset's, median | IQR |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for pause in pauses:
        times: Times = alternate(ways, turns)
        for way in ways:
            speeds = median_and_spread([photos / seconds for seconds in times[way]], digits=1)
            shares = median_and_spread(ratios(times, "webdataset", way), digits=2)
            lines.append(f"| {pause * 1000:.0f} ms | {way} | {speeds} | {shares} |")
    return "\n".join(lines)


def resume_table(folder: Path, url: str, sent: Any, photos: int) -> str:
    """Time and downloaded share until the first batch of the second half of an epoch."""
    shards, step = len(list(folder.glob("shards/*.tar"))), photos // BATCH // 2
    total = sum(path.stat().st_size for path in folder.glob("shards/*.tar"))
    lines = [
        "| way | seconds to the first batch | share of the set fetched until then |",
        "| --- | --- | --- |",
    ]
    cache = folder / "resumed"
    ways = {
        "ours, at the exact row": lambda: take(own_batches(url, cache, step), 0.0, 1),
        "webdataset, passing over what was read": lambda: take(
            webdataset_batches(url, shards, 1), 0.0, step + 1
        ),
    }
    for way, read in ways.items():
        before, began = sent.value, time.perf_counter()
        read()
        lines.append(f"| {way} | {time.perf_counter() - began:.2f} | {(sent.value - before) / total:.0%} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--photos", type=int, default=512)
    parser.add_argument("--side", type=int, default=400, help="px of a photo")
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--latency_ms", type=float, default=20.0)
    parser.add_argument("--mb_per_s", type=float, default=25.0, help="of each connection")
    parser.add_argument("--step_ms", type=float, nargs="*", default=[0.0, 8.0], help="a photo")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args(arguments)
    print(heading("webdataset"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_set(folder, options.photos, options.side, options.photos // options.shards)
        tars = [path.stat().st_size for path in shards.glob("*.tar")]
        print(
            f"{options.photos} synthetic photos, {len(tars)} shards of {max(tars) / 1e6:.1f} MB; "
            f"{options.latency_ms:g} ms before each answer, {options.mb_per_s:g} MB/s a connection\n"
        )
        with served(shards, Link(options.latency_ms / 1000, options.mb_per_s * 1e6)) as (url, sent):
            pauses = [pause / 1000 for pause in options.step_ms]
            print(speed_table(folder, url, options.photos, pauses, options.turns), "\n")
            print(resume_table(folder, url, sent, options.photos))


if __name__ == "__main__":
    main()
