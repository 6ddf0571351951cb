"""Photos read from shards, against files, webdataset's own pipeline and Hugging Face datasets.

Every method reads the same synthetic photos of 4032 x 3024 px (street scenes with sensor noise, about
4 MB, q90, 4:2:0) in one process on one thread; methods take turns. Files are in the page cache. webdataset
reads sequentially, as designed; all others read at random.

    python benchmarks/data_shards.py
"""

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from measuring import Times, alternate, heading, median_and_spread, ratios
from PIL import Image

from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.demo.synthetic.metadata import photo_facts
from roadwork_dist.demo.synthetic.render import render
from roadwork_dist.photos.images import ImageSource, photo_size
from roadwork_dist.photos.jpeg import decode_for_views
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.photos.photo import views_of_photo
from roadwork_dist.photos.views import ViewGeometry, make_views, photo_boxes
from roadwork_dist.sources import load_manifest
from roadwork_dist.storage.shards.descriptors import open_files
from roadwork_dist.storage.shards.image import ShardImage
from roadwork_dist.storage.shards.plan import ShardOptions
from roadwork_dist.storage.shards.write import write_shards

GEOMETRY = ViewGeometry(512)
SHARD_BYTES = 50_000_000


@dataclass(frozen=True)
class Stored:
    """The same photos in every storage format."""

    loose: Manifest
    shards: Manifest
    compact: Manifest
    tars: list[str]
    saved: Any
    """``datasets.Dataset`` with a column of undecoded images, memory-mapped."""


def photo_bytes(number: int, size: tuple[int, int]) -> bytes:
    """A synthetic street scene with sensor noise, as a camera would store it."""
    scene = render(photo_facts(7, "train", number), 7, (size[0] // 2, size[1] // 2)).photo.resize(size)
    noise = np.random.default_rng(number).normal(0, 7, (size[1], size[0], 1)).astype(np.float32)
    pixels = (np.asarray(scene) + noise).clip(0, 255).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def store(folder: Path, count: int, size: tuple[int, int]) -> Stored:
    """Write the photos as files, shards, compact shards and a Hugging Face data set."""
    import datasets

    datasets.disable_progress_bars()
    (folder / "photos").mkdir()
    for number in range(count):
        (folder / "photos" / f"{number}.jpg").write_bytes(photo_bytes(number, size))
    rows = "".join(f"{number},photos/{number}.jpg,{number % 2}\n" for number in range(count))
    (folder / "metadata.csv").write_text("id,image,label\n" + rows)
    load = partial(load_manifest, config=DataConfig(), name="train")
    loose = load(str(folder))
    for name, views in (("shards", None), ("compact", GEOMETRY)):
        write_shards(loose, folder / name, ShardOptions(size=SHARD_BYTES, compact=views))
    saved = datasets.Dataset.from_dict(
        {"image": [str(folder / "photos" / f"{number}.jpg") for number in range(count)]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    saved.save_to_disk(folder / "saved")
    read = datasets.load_from_disk(str(folder / "saved")).cast_column("image", datasets.Image(decode=False))
    tars = sorted(str(path) for path in (folder / "shards").glob("*.tar"))
    return Stored(loose, load(str(folder / "shards")), load(str(folder / "compact")), tars, read)


def naive_views(data: bytes) -> list[np.ndarray[Any, Any]]:
    """The simplest implementation: full decode, and every crop resized with Pillow's Lanczos filter."""
    photo = Image.open(BytesIO(data)).convert("RGB")
    boxes = photo_boxes(GEOMETRY, *photo.size)
    side = (GEOMETRY.size, GEOMETRY.size)
    crops = ((b.left, b.top, b.left + b.width, b.top + b.height) for b in boxes)
    return [np.asarray(photo.resize(side, Image.Resampling.LANCZOS, box=crop)) for crop in crops]


def from_webdataset(tars: list[str], use: Callable[[bytes], object]) -> None:
    """The pipeline of webdataset itself: sequential, keys and metadata decoded."""
    import webdataset

    for sample in webdataset.WebDataset(tars, shardshuffle=False).decode():
        use(sample["jpg"])


def in_order(sources: Iterable[Any], use: Callable[[Any], object]) -> None:
    for source in sources:
        use(source)


def without_checksum(source: ImageSource) -> bytes:
    """The read alone; the difference is the cost of the checksum."""
    assert isinstance(source, ShardImage)
    return open_files.read(source.location, source.offset, source.length)


def ways_to_bytes(stored: Stored, repeats: int) -> dict[str, Callable[[], object]]:
    """Every photo's bytes, ``repeats`` times, in one random order."""
    rows = np.random.default_rng(0).permutation(len(stored.loose)).tolist() * repeats
    loose = [stored.loose[row].image for row in rows]
    shards = [stored.shards[row].image for row in rows]
    return {
        "loose files": lambda: in_order(loose, lambda source: source.read()),
        "shards": lambda: in_order(shards, lambda source: source.read()),
        "shards, checksum left out": lambda: in_order(shards, without_checksum),
        "webdataset, sequential": lambda: from_webdataset(stored.tars * repeats, len),
        "datasets, saved to disk": lambda: [stored.saved[row]["image"]["bytes"] for row in rows],
    }


def ways_to_views(stored: Stored) -> dict[str, Callable[[], object]]:
    """Twelve views of 512 px of every photo."""
    rows = np.random.default_rng(0).permutation(len(stored.loose)).tolist()
    views = partial(views_of_photo, geometry=GEOMETRY)
    return {
        "loose files": lambda: in_order((stored.loose[row].image for row in rows), views),
        "shards": lambda: in_order((stored.shards[row].image for row in rows), views),
        "compact shards": lambda: in_order((stored.compact[row].image for row in rows), views),
        "loose files, plain Pillow": lambda: [naive_views(stored.loose[row].image.read()) for row in rows],
        "webdataset, plain Pillow": lambda: from_webdataset(stored.tars, naive_views),
        "datasets, plain Pillow": lambda: [naive_views(stored.saved[row]["image"]["bytes"]) for row in rows],
    }


def table(times: Times, photos: int, to: str) -> str:
    """Markdown: milliseconds a photo, and how many times as long ``to`` took."""
    lines = [f"| way | ms a photo | IQR | speed, {to} = 1 | IQR |", "|---|--:|--:|--:|--:|"]
    for name, values in times.items():
        own = median_and_spread([1000 * seconds / photos for seconds in values])
        speed = median_and_spread(ratios(times, to, name), digits=2)
        lines.append(f"| {name} | {own} | {speed} |")
    return "\n".join(lines)


def bytes_table(stored: Stored, turns: int, repeats: int = 4) -> str:
    """Speed of reading bytes."""
    times = alternate(ways_to_bytes(stored, repeats), turns)
    return table(times, repeats * len(stored.loose), "loose files")


def views_table(stored: Stored, turns: int) -> str:
    """Speed of reading views."""
    return table(alternate(ways_to_views(stored), turns), len(stored.loose), "loose files, plain Pillow")


def profile_table(stored: Stored, turns: int, repeats: int = 8) -> str:
    """Time of a compact photo by step, from its tar to its views."""
    source = stored.compact[0].image
    data = source.read()
    photo = decode_for_views(data, GEOMETRY, name=source.name)
    size = photo_size(source)[::-1]
    steps: dict[str, Callable[[], object]] = {
        "all": lambda: views_of_photo(source, GEOMETRY),
        "read, with checksum": source.read,
        "decode": lambda: decode_for_views(data, GEOMETRY, name=source.name),
        "cut twelve views": lambda: make_views(photo.pixels, GEOMETRY, size),
    }
    again = {
        name: partial(in_order, [None] * repeats, lambda _, step=step: step()) for name, step in steps.items()
    }
    times = alternate(again, turns)
    lines = ["| step of a compact photo | ms | IQR | share of all | IQR |", "|---|--:|--:|--:|--:|"]
    for name, values in times.items():
        own = median_and_spread([1000 * seconds / repeats for seconds in values])
        lines.append(f"| {name} | {own} | {median_and_spread(ratios(times, name, 'all'), digits=2)} |")
    return "\n".join(lines)


def sizes(stored: Stored) -> str:
    """One line: bytes of photos and of their compact form."""
    original, compact = (
        sum(len(sample.image.read()) for sample in manifest) / len(manifest) / 1e6
        for manifest in (stored.loose, stored.compact)
    )
    return f"a photo has {original:.2f} MB, compact {compact:.2f} MB: {original / compact:.1f} times smaller"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=6, help="different photos (default 6)")
    parser.add_argument("--turns", type=int, default=5, help="turns of every method (default 5)")
    parser.add_argument("--width", type=int, default=4032, help="of a photo in px (default 4032)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        stored = store(Path(folder), options.photos, (options.width, options.width * 3 // 4))
        print(heading("webdataset", "datasets", "simplejpeg", "pillow"))
        print(f"{options.turns} turns of {options.photos} photos; {sizes(stored)}\n")
        print(f"To bytes:\n\n{bytes_table(stored, options.turns)}\n")
        print(f"To twelve views of 512 px:\n\n{views_table(stored, options.turns)}\n")
        print(profile_table(stored, options.turns))


if __name__ == "__main__":
    main()
