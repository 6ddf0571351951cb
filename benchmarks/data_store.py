"""Feature store: opening and reading a large store, filling one, and training from it.

- large: a store of a million photos (small D, so that it fits on the disk): time to open it, photos per
  second read at random and along shuffled blocks, memory; against one file per photo, the simplest
  alternative
- extract: photos through the backbone into the store, against the backbone alone on views in memory
- head: training steps of the head from the store (in memory, mapped, row by row), against batches in memory
- demo: an epoch of the demo from the store, against computing the features in the epoch

Methods take turns, so ratios are comparable. Everything runs on one thread, except for the loader process
of `extract`.

    python benchmarks/data_store.py
    python benchmarks/data_store.py large --photos 10000000
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from measuring import Times, alternate, heading, median_and_spread, ratios
from PIL import Image
from torch import Tensor, nn

from roadwork_dist.config.experiment import BackboneConfig, ExperimentConfig
from roadwork_dist.config.io import parse_experiment
from roadwork_dist.datasets.dataset import RoadworkDataset, collate
from roadwork_dist.demo.synthetic.dataset import write_synthetic
from roadwork_dist.detector.backbone import Backbone, load_backbone
from roadwork_dist.features.content_hashes import content_hashes
from roadwork_dist.features.extract import extract
from roadwork_dist.features.store import FeatureSpace, FeatureStore
from roadwork_dist.photos.images import BytesImage
from roadwork_dist.photos.manifest import Manifest, Sample
from roadwork_dist.photos.photo import PhotoViews
from roadwork_dist.photos.views import ViewGeometry
from roadwork_dist.recipes.data import DatasetBuilder, load_manifests, photo_views
from roadwork_dist.recipes.pretrain import build_model, build_task
from roadwork_dist.trainer.engine.accelerator import build_accelerator
from roadwork_dist.trainer.feed.loader import load_batches

PARTS = ("large", "extract", "head", "demo")
VIEWS, BATCH, BLOCK = 12, 32, 1024
"""Views per photo; photos per batch; contiguous photos that are read in a row."""
FILES = 2048
"""Photos with one feature file each, for comparison."""

Step = Callable[[Any], object]


def memory(kind: str) -> int:
    """Resident bytes of this process: ``RssAnon`` is private, ``RssFile`` can be reclaimed by the system."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(kind))
    return int(line.split()[1]) * 1024


def table(rows: list[list[str]]) -> str:
    """Markdown table; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|--:" * (len(rows[0]) - 1) + "|", *lines[1:]])


# large


def space(dtype: Any = "bf16") -> FeatureSpace:
    """The space of random features."""
    return FeatureSpace({"size": 512}, None, "random numbers", dtype)


def fill(root: Path, photos: int, width: int) -> float:
    """Write random features; returns photos per second."""
    values = torch.randn(1024, VIEWS, width).bfloat16()
    started = time.perf_counter()
    with FeatureStore(root, space()) as store:
        for number in range(photos):
            store.put(str(number), "", None, values[number % 1024])
    return photos / (time.perf_counter() - started)


def read_batches(store: FeatureStore, rows: np.ndarray[Any, Any]) -> float:
    """Read in batches; returns photos per second."""
    started = time.perf_counter()
    for batch in np.split(rows, len(rows) // BATCH):
        store.read([str(row) for row in batch], [""] * len(batch), None)
    return len(rows) / (time.perf_counter() - started)


def large_table(photos: int, width: int, reads: int) -> str:
    """Time to open and read a large store and a small one."""
    rows = [["photos", "size", "written a second", "opened in ms", "own memory", "read a second, at random",
             "in shuffled blocks", "own memory"]]  # fmt: skip
    for count in (1000, photos):
        with tempfile.TemporaryDirectory() as folder:
            written = fill(Path(folder), count, width)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
            before = memory("RssAnon")
            seconds = alternate({"open": lambda folder=folder: FeatureStore(folder, space())}, 5)["open"]
            store = FeatureStore(folder, space())
            opened, after = 1000 * statistics.median(seconds), memory("RssAnon")
            rng = np.random.default_rng(0)
            blocks = rng.permutation(max(1, count // BLOCK))[: max(1, reads // BLOCK)]
            along = (blocks[:, None] * BLOCK + np.arange(min(count, BLOCK))).flatten()
            along = along[: len(along) // BATCH * BATCH]
            at_random = read_batches(store, rng.integers(0, count, reads // BATCH * BATCH))
            in_blocks = read_batches(store, along)
            rows.append([
                f"{count:,}", f"{size / 1e6:.0f} MB", f"{written:,.0f}", f"{opened:.1f}",
                f"{(after - before) / 1e6:+.1f} MB", f"{at_random:,.0f}", f"{in_blocks:,.0f}",
                f"{(memory('RssAnon') - before) / 1e6:+.1f} MB",
            ])  # fmt: skip
    return table(rows)


def files_table(width: int, turns: int) -> str:
    """Reading batches of real size, against one file per photo."""
    photos = FILES
    with tempfile.TemporaryDirectory() as folder:
        values = torch.randn(photos, VIEWS, width).bfloat16()
        with FeatureStore(Path(folder) / "store", space()) as store:
            for number in range(photos):
                store.put(str(number), "", None, values[number])
                torch.save(values[number].clone(), Path(folder) / f"{number}.pt")
        chosen = np.random.default_rng(0).permutation(photos)[:512]

        def from_files() -> None:
            for batch in np.split(chosen, len(chosen) // BATCH):
                torch.stack([torch.load(Path(folder) / f"{row}.pt") for row in batch])

        ways = {"one file a photo (torch.load)": from_files, "store": lambda: read_batches(store, chosen)}
        times = alternate(ways, turns)
    first = "one file a photo (torch.load)"
    rows = [["way", "ms a batch", "IQR", "times as fast", "IQR"]]
    for name in ways:
        each = median_and_spread([1000 * s / (len(chosen) / BATCH) for s in times[name]], digits=2)
        rows.append([name, *each.split(" | "), *median_and_spread(ratios(times, first, name)).split(" | ")])
    return table(rows)


# extract


def photos_in_memory(count: int, size: tuple[int, int] = (1280, 960)) -> list[Sample]:
    """Synthetic JPEGs of smooth colours with a little noise."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)
        buffer = BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        samples.append(Sample(str(number), BytesImage(f"{number}.jpg", buffer.getvalue())))
    return samples


def extract_table(count: int, turns: int, batch_views: int = 48) -> str:
    """Photos per second into the store, against the backbone alone."""
    backbone = load_backbone(
        BackboneConfig(name="efficientnet_lite0", dtype="fp32"), device=torch.device("cpu")
    )
    side = backbone.view_size("auto")
    samples, views = photos_in_memory(count), PhotoViews(ViewGeometry(side))
    hashes = content_hashes([sample.image for sample in samples])
    ready = torch.cat([views.plain(sample.image) for sample in samples])

    def bare() -> None:
        for start in range(0, len(ready), batch_views):
            backbone(ready[start : start + batch_views])

    def into_store(workers: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = FeatureStore(folder, space())
            extract(
                samples,
                hashes,
                views=views,
                store=store,
                encode=backbone,
                batch_views=batch_views,
                workers=workers,
            )

    first = "the backbone alone, on views in memory"
    ways = {
        first: bare,
        "extract, one process decodes": lambda: into_store(1),
        "extract, no process decodes": lambda: into_store(0),
    }
    return ratio_table(alternate(ways, turns), first, count, "photos a second")


def ratio_table(times: Times, first: str, count: int, unit: str) -> str:
    """Rates, and each method's rate as a share of the first one's, turn by turn."""
    rows = [["way", unit, "IQR", f"of {first}", "IQR"]]
    for name, values in times.items():
        rate = median_and_spread([count / seconds for seconds in values], digits=2)
        share = median_and_spread(ratios(times, first, name))
        rows.append([name, *rate.split(" | "), *share.split(" | ")])
    return table(rows)


# head


def stored_rows(root: Path, photos: int, width: int) -> RoadworkDataset:
    """Rows with random features and partly missing metadata."""
    rng = np.random.default_rng(0)
    weathers = ("sunny", "rainy", None)
    samples = tuple(
        Sample(
            str(number),
            BytesImage(str(number), b""),
            label=int(rng.integers(2)),
            latitude=float(rng.uniform(30, 45)),
            longitude=float(rng.uniform(-120, -75)),
            weather=weathers[rng.integers(3)],
        )
        for number in range(photos)
    )
    with FeatureStore(root, space()) as store:
        for number in range(photos):
            store.put(str(number), str(number), None, torch.randn(VIEWS, width))
    hashes = [str(number) for number in range(photos)]
    return RoadworkDataset(
        Manifest("random", samples), views=PhotoViews(ViewGeometry(512)), store=store, hashes=hashes
    )


def training_step(model: nn.Module, config: ExperimentConfig, *, mask_head: bool) -> Step:
    """Forward, loss, backward and AdamW, without the rest of a Trainer."""
    task = build_task(config, mask_head=mask_head)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(batch: Any) -> None:
        sums = task(model, batch).sums
        torch.stack([value for value in sums.values() if value.requires_grad]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Named:
    """The attributes of a backbone that building a head needs."""

    name, identity = "random", "random"

    def __init__(self, width: int) -> None:
        self.width = width

    def view_size(self, size: object) -> int:
        """Constant."""
        return 512


def row_by_row(dataset: RoadworkDataset, batches: list[list[int]]) -> Iterator[Any]:
    """As a plain DataLoader would."""
    for rows in batches:
        yield collate([dataset[row] for row in rows])


def head_table(steps: int, turns: int, width: int = 1280, settings: Sequence[str] = ()) -> str:
    """Training the head from the store, against batches in memory; also the time of the batches alone."""
    config = parse_experiment(["--precision=fp32", "--loss.weights=auto", *settings])
    model = build_model(config, Named(width), mask_head=False)  # type: ignore[arg-type]
    step = training_step(model.train(), config, mask_head=False)
    rng = np.random.default_rng(0)
    batches = np.split(rng.permutation(steps * BATCH), steps)
    indices = [rows.tolist() for rows in batches]
    with tempfile.TemporaryDirectory() as folder:
        mapped = stored_rows(Path(folder), steps * BATCH, width)
        resident = RoadworkDataset(
            mapped.manifest, views=mapped.views, store=mapped.store, hashes=mapped.hashes
        )
        resident.make_resident(torch.device("cpu"))
        ready = [collate(resident.__getitems__(rows)) for rows in indices]
        sources: dict[str, Callable[[], Iterator[Any]]] = {
            "batches in memory": lambda: iter(ready),
            "store, in memory": lambda: iter(load_batches(resident, indices, collate=collate)),
            "store, mapped": lambda: iter(load_batches(mapped, indices, collate=collate)),
            "store, row by row": lambda: row_by_row(mapped, indices),
        }

        def read(source: Callable[[], Iterator[Any]]) -> None:
            for _ in source():
                pass

        def train(source: Callable[[], Iterator[Any]]) -> None:
            for batch in source():
                step(batch)

        alone = alternate({name: lambda s=s: read(s) for name, s in sources.items()}, 3 * turns)
        times = alternate({name: lambda s=s: train(s) for name, s in sources.items()}, turns)
    per_batch = [["batches alone", "ms a batch"]]
    per_batch += [[name, f"{1000 * statistics.median(values) / steps:.2f}"] for name, values in alone.items()]
    trained = ratio_table(times, "batches in memory", steps * BATCH, "photos a second")
    return f"{trained}\n\n{table(per_batch)}"


# demo


def demo_table(photos: int, turns: int) -> str:
    """An epoch of the demo from the store and online, and the part of it before the head."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_synthetic(Path(folder), n_train=photos, n_val=4, n_target=4, n_large=0, workers=1)
        words = [f"--data.train={data.train}", f"--data.val={data.val}", f"--data.target={data.target}"]
        words += [f"--features.dir={folder}/features", "--device=cpu", "--model.metadata=false"]
        config = parse_experiment(words)
        accelerator = build_accelerator(device="cpu")
        backbone = load_backbone(config.backbone, device=accelerator.device)
        epochs: dict[str, Callable[[], object]] = {}
        with redirect_stdout(StringIO()):
            for mode in ("online", "cached"):
                mine = replace(config, features=replace(config.features, mode=mode))  # type: ignore[arg-type]
                epochs |= demo_epochs(mine, backbone, accelerator, mode)
        times = alternate(epochs, turns)
    rows = [["", "seconds", "IQR"]]
    rows += [[name, *median_and_spread(values).split(" | ")] for name, values in times.items()]
    whole = median_and_spread(ratios(times, "epoch, online", "epoch, cached"), digits=1)
    part = median_and_spread(ratios(times, "features, online", "features, cached"), digits=0)
    return (
        f"{table(rows)}\n\nFrom the store the epoch takes 1/{whole.split(' | ')[0]} of the time, and what "
        f"comes before the head 1/{part.split(' | ')[0]}."
    )


def demo_epochs(
    config: ExperimentConfig, backbone: Backbone, accelerator: Any, mode: str
) -> dict[str, Callable[[], object]]:
    """An epoch, and its features alone, without the head."""
    manifest = load_manifests(config).train
    dataset = DatasetBuilder(config, backbone, accelerator, masks=True).build(manifest, augment=True)
    assert dataset.views == photo_views(config, backbone, augment=True)
    step = training_step(build_model(config, backbone, mask_head=True).train(), config, mask_head=True)
    rows = list(range(len(dataset)))
    batches = [rows[start : start + config.batch_size] for start in range(0, len(rows), config.batch_size)]

    def features() -> list[Tensor]:
        loaded = load_batches(dataset, batches, collate=collate)
        return [b["features"] if "features" in b else backbone(b["views"].flatten(0, 1)) for b in loaded]

    def epoch() -> None:
        for batch in load_batches(dataset, batches, collate=collate):
            step(batch)

    return {f"epoch, {mode}": epoch, f"features, {mode}": features}


def main(words: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--photos", type=int, default=1_000_000, help="of the large store (default: a million)"
    )
    parser.add_argument("--reads", type=int, default=64 * BLOCK, help="photos read of it (default: 65,536)")
    parser.add_argument("--width", type=int, default=16, help="D of the large store (default: 16)")
    parser.add_argument("--count", type=int, default=32, help="photos of extract and demo (default: 32)")
    parser.add_argument("--steps", type=int, default=8, help="steps of the head a turn (default: 8)")
    parser.add_argument("--turns", type=int, default=5, help="turns of every method (default: 5)")
    options = parser.parse_args(words)
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"no such part: {', '.join(unknown)}; choose of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    print(heading("timm"))
    parts: dict[str, Callable[[], str]] = {
        "large": lambda: (
            f"{large_table(options.photos, options.width, options.reads)}\n\n"
            f"Batches of {BATCH} photos, D 1280:\n\n{files_table(1280, options.turns)}"
        ),
        "extract": lambda: extract_table(options.count, options.turns),
        "head": lambda: head_table(options.steps, options.turns),
        "demo": lambda: demo_table(options.count, options.turns),
    }
    for name in options.parts or PARTS:
        print(f"### {name}\n\n{parts[name]()}\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
