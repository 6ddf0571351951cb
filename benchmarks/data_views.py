"""One photo to twelve views: against plain Pillow, torchvision, and decoding alone.

The photos are synthetic street scenes of 4032 x 3024 px with sensor noise (about 4 MB, q90, 4:2:0), or
those given. Everything runs on one thread; methods take turns, so ratios are comparable. Worst view: the
lowest PSNR of the twelve views of any photo against Pillow's Lanczos crops of the same JPEG.

    python benchmarks/data_views.py
    python benchmarks/data_views.py --photos street/*.jpg --turns 9
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import simplejpeg
import torch
from data_shards import naive_views, photo_bytes
from measuring import Times, alternate, heading, median_and_spread, ratios
from PIL import Image
from torch import Tensor

from roadwork_dist.datasets.dataset import RoadworkDataset, collate
from roadwork_dist.photos.images import FileImage
from roadwork_dist.photos.jpeg import decode_for_views
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.photos.photo import PhotoViews, views_of_photo
from roadwork_dist.photos.views import ViewGeometry, layout_of, make_views, photo_boxes, shared_image
from roadwork_dist.trainer.feed.loader import load_batches

FAST, EXACT = ViewGeometry(512), ViewGeometry(512, quality="exact")
HALF, FULL = "half-scale decode alone", "full decode alone"
NAIVE = "plain Pillow, 12 Lanczos crops"

Way = Callable[[bytes], object]


def reduced(data: bytes, divisor: int) -> object:
    """Decode only, by simplejpeg."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    return simplejpeg.decode_jpeg(
        data, "RGB", min_height=-(-height // divisor), min_width=-(-width // divisor)
    )


def with_torchvision(data: bytes) -> Tensor:
    """A common alternative: torchvision's decoder, and a resized crop for every view."""
    from torchvision.io import decode_jpeg
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    photo = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    cut = partial(tv.resized_crop, size=[512, 512], interpolation=InterpolationMode.BICUBIC, antialias=True)
    boxes = [tuple(map(round, box)) for box in photo_boxes(FAST, photo.shape[2], photo.shape[1])]
    return torch.stack([cut(photo, box[1], box[0], box[3], box[2]) for box in boxes])


def compact(data: bytes) -> bytes:
    """The shared image as a JPEG of q95, 4:4:4, as compact shards keep it."""
    stored = decode_for_views(data, EXACT, name="photo")
    shared = shared_image(stored.pixels, layout_of(EXACT, *stored.photo_size), stored.orientation)
    pixels = np.ascontiguousarray(shared.permute(1, 2, 0).numpy())
    return bytes(simplejpeg.encode_jpeg(pixels, 95, "RGB", "444"))


def turned(data: bytes) -> bytes:
    """The same photo as stored by a phone held upright: EXIF contains the rotation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = BytesIO()
    Image.open(BytesIO(data)).save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


def on_gpu(photos: list[bytes]) -> list[Tensor]:
    """Hardware decode of all photos together and the same views, on the GPU; synchronises."""
    from roadwork_dist.photos.nvjpeg import views_on_gpu

    views = views_on_gpu(photos, FAST, device=torch.device("cuda"))
    torch.cuda.synchronize()
    return views


def ways() -> dict[str, tuple[Way, Callable[[bytes], bytes]]]:
    """Name -> the timed function, and the untimed preparation of the photo."""
    fast, exact = (partial(views_of_photo, geometry=geometry) for geometry in (FAST, EXACT))

    def same(data: bytes) -> bytes:
        return data

    found: dict[str, tuple[Way, Callable[[bytes], bytes]]] = {
        NAIVE: (naive_views, same),
        "torchvision decode, 12 resized crops": (with_torchvision, same),
        FULL: (partial(reduced, divisor=1), same),
        HALF: (partial(reduced, divisor=2), same),
        "fast": (fast, same),
        "exact": (exact, same),
        "fast, photo turned by EXIF": (fast, turned),
        "from the compact form, q95 4:4:4": (fast, compact),
    }
    if torch.cuda.is_available():
        found["nvJPEG, one photo at a time"] = (lambda data: on_gpu([data])[0], same)
    return found


def times_of(photos: list[bytes], turns: int) -> Times:
    """Seconds for all photos, by method."""
    candidates: dict[str, Callable[[], object]] = {}
    for name, (way, prepare) in ways().items():
        prepared = [prepare(data) for data in photos]
        candidates[name] = partial(lambda way, prepared: [way(data) for data in prepared], way, prepared)
    if torch.cuda.is_available():
        candidates["nvJPEG, all photos at once"] = partial(on_gpu, photos)
    return alternate(candidates, turns)


def speed_table(times: Times, photos: int) -> str:
    """Markdown: milliseconds per photo, ratio to the half-scale decode, and speed against plain Pillow."""
    lines = [
        f"| way | ms a photo | IQR | time, {HALF} = 1 | IQR | speed, plain Pillow = 1 | IQR |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, values in times.items():
        own = median_and_spread([1000 * seconds / photos for seconds in values], digits=1)
        to_half = median_and_spread(ratios(times, name, HALF), digits=2)
        speed = median_and_spread(ratios(times, NAIVE, name), digits=1)
        lines.append(f"| {name} | {own} | {to_half} | {speed} |")
    return "\n".join(lines)


def psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in dB of 8-bit values."""
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


def quality_table(photos: list[bytes]) -> str:
    """Markdown: PSNR of each method's views against plain Pillow's."""
    lines = ["| way | global | tiles | squares | worst view |", "|---|--:|--:|--:|--:|"]
    wanted = [torch.from_numpy(np.stack(naive_views(data))).permute(0, 3, 1, 2) for data in photos]
    for name, (way, prepare) in ways().items():
        if name in (NAIVE, FULL, HALF) or prepare is turned:
            continue
        got = [torch.as_tensor(way(prepare(data))).cpu() for data in photos]
        rows = [[psnr(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(got, wanted, strict=True)]
        parts = (slice(0, 1), slice(1, -2), slice(-2, None))
        means = [statistics.mean(value for row in rows for value in row[part]) for part in parts]
        cells = " | ".join(f"{value:.1f}" for value in [*means, min(map(min, rows))])
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def loader_table(photos: list[bytes], turns: int, batches: int = 24, size: int = 4) -> str:
    """Markdown: photos per second of a loader with one process and with two, between first and last batch."""
    with tempfile.TemporaryDirectory() as folder:
        samples = []
        for number in range(size):
            path = Path(folder) / f"{number}.jpg"
            path.write_bytes(photos[number % len(photos)])
            samples.append(Sample(id=str(number), image=FileImage(path), label=0))
        dataset = RoadworkDataset(Manifest("photos", samples), views=PhotoViews(FAST))
        seconds: Times = {"0": [], "1": [], "2": []}

        def read(workers: int) -> None:
            rows = [list(range(size))] * batches
            loader = iter(load_batches(dataset, rows, workers=workers, collate=collate))
            next(loader)  # by then all processes have started and imported
            start = time.perf_counter()
            for _ in loader:
                pass
            seconds[str(workers)].append(time.perf_counter() - start)

        alternate({name: partial(read, int(name)) for name in seconds}, turns)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first turn warms up
    lines = ["| loader processes | photos/s | IQR | one process = 1 | IQR |", "|---|--:|--:|--:|--:|"]
    for name, values in seconds.items():
        speed = median_and_spread([(batches - 1) * size / each for each in values], digits=1)
        label = "none: in the main process" if name == "0" else name
        lines.append(f"| {label} | {speed} | {median_and_spread(ratios(seconds, '1', name), digits=2)} |")
    return "\n".join(lines)


def views_table_from_memory(data: bytes, turns: int) -> str:
    """One line: time of cutting the views of a decoded photo."""
    stored = decode_for_views(data, FAST, name="photo")
    cut = partial(make_views, stored.pixels, FAST, stored.photo_size, stored.orientation)
    times = alternate({"cut": cut}, turns)["cut"]
    return f"Cutting the views of a decoded photo: {1000 * statistics.median(times):.1f} ms"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, nargs="+", help="JPEGs (default: synthetic ones)")
    parser.add_argument("--count", type=int, default=3, help="synthetic photos (default 3)")
    parser.add_argument("--turns", type=int, default=7, help="turns of every method (default 7)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torchvision's decoders are deprecated
    if options.photos:
        photos = [path.read_bytes() for path in options.photos]
    else:
        photos = [photo_bytes(number, (4032, 3024)) for number in range(options.count)]
    print(heading("torchvision", "simplejpeg", "pillow"))
    sizes = ", ".join(f"{len(data) / 1e6:.1f}" for data in photos)
    print(f"{options.turns} turns of {len(photos)} photos of {sizes} MB\n")
    print(f"{speed_table(times_of(photos, options.turns), len(photos))}\n")
    print(f"{views_table_from_memory(photos[0], options.turns)}\n")
    print(f"PSNR in dB against {NAIVE}:\n\n{quality_table(photos)}\n")
    print(f"Batches of four photos:\n\n{loader_table(photos, options.turns)}")


if __name__ == "__main__":
    main()
