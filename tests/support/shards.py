"""Small photos with masks and metadata, and shard sets of them."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from roadwork_dist.config.experiment import DataConfig
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.sources import load_manifest
from roadwork_dist.storage.shards.plan import ShardOptions
from roadwork_dist.storage.shards.write import Written, write_shards


def picture(seed: int, size: tuple[int, int] = (96, 72), kind: str = "JPEG", **options: Any) -> bytes:
    """A picture of blocks that no other seed has."""
    blocks = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(file, kind, **options)
    return file.getvalue()


def write_photos(folder: Path, count: int = 12, size: tuple[int, int] = (96, 72)) -> Path:
    """A table of photos: JPEGs and PNGs, most metadata null, every third with a mask."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["id,image,label,latitude,longitude,weather,description,mask,group"]
    for number in range(count):
        kind = "PNG" if number % 5 == 4 else "JPEG"
        name = f"photo-{number}.{'png' if kind == 'PNG' else 'jpg'}"
        (folder / name).write_bytes(picture(number, size, kind))
        mask = f"mask-{number}.png" if number % 3 == 0 else ""
        if mask:
            bits = np.random.default_rng(number).integers(0, 64, (9, 12), dtype=np.uint8)
            Image.fromarray(bits).resize(size, Image.Resampling.NEAREST).save(folder / mask)
        known = f'{40 + number / 7},-75.25,rainy,"Kegel, ärgerlich"' if number % 2 else ",,,"
        lines.append(f"id/{number},{name},{number % 2},{known},{mask},drive {number // 4}")
    table = folder / "metadata.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def load(source: object, **options: Any) -> Manifest:
    return load_manifest(str(source), DataConfig(**options), name="train")


def write_set(table: Path, out: Path, *, workers: int = 1, size: int = 30_000, **options: Any) -> Written:
    """A set of several shards."""
    return write_shards(load(table), out, ShardOptions(size=size, **options), workers=workers)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
