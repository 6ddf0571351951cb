"""Write a small data set of real photos: cut-outs of Debian's ``tuxpaint-stamps-default`` on plain colours.

The package (GPL-2) is installed by the user and never vendored. Label 1 = road signs, traffic cones
and vehicles; label 0 = everything else (animals, food, tools, plants, …). One photo per cut-out; numbered
cut-outs of one object (``fireman200b``, ``fireman240a``) form one group, which splits keep together.
"""

import csv
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.common.random import generator_for

STAMPS = Path("/usr/share/tuxpaint/stamps")
MARKER = "cutouts.json"
_COLUMNS = ("id", "image", "label", "kind", "group")

_PHOTO_FOLDERS = (
    "animals",
    "food",
    "hobbies",
    "household",
    "medical",
    "military",
    "people",
    "plants",
    "space",
    "sports",
    "town",
    "vehicles",
)
"""Folders of photographs; clothes, seasonal, symbols and naturalforces are mostly drawings."""
_POSITIVE_FOLDERS = ("town/roadsigns", "vehicles", "military/vehicles")
_SKIPPED_WORDS = ("cartoon", "toys", "plastic", "mirror")
_SKIPPED = (
    # drawings among the photographs
    "animals/mammals/hedgehog",
    "food/dessert/pizza",
    "food/pizza",
    "household/arttools/highlighter",
    "household/rubberduck",
    "medical/tooth",
    "people/body_parts",
    "town/flags",
    "town/monuments/inukshuk-outline",
    "town/roadsigns/stoplight",
    # vehicle parts, the lettering of a vehicle, and a construction machine filed under tools
    "household/tools/cementmixer",
    "vehicles/7spoke256",
    "vehicles/emergency/sedan_police",
    "vehicles/wheel_tractor",
)


@dataclass(frozen=True)
class _CutOut:
    path: Path
    name: str  # path below the stamps folder, without suffix
    label: int


def write_cutouts(out: Path, *, stamps: Path = STAMPS, seed: int = 42, size: int = 256) -> Path:
    """Paste every photographic cut-out onto a plain background and write the table of the photos.

    The folder gets ``metadata.csv`` (id, image, label, kind = the cut-out's folder, group = its name
    without a trailing number), ``images/*.jpg`` and, last, a marker; a complete folder is not written
    again. The output is a pure function of the stamps, ``seed`` and ``size``.

    Args:
        out: output folder, created if missing.
        stamps: folder where Debian's package installs its stamps.
        seed: seed of background colours, positions and scales.
        size: side of the square photos in px, at least 64.

    Returns:
        The path of the table.

    Raises:
        DataError: the stamps are not installed, lack cut-outs of a class, or ``size`` is too small.
    """
    if size < 64:
        raise DataError(f"size is {size}, expected at least 64 px")
    cutouts = _find(stamps)
    table = out / "metadata.csv"
    parameters = {"columns": _COLUMNS, "seed": seed, "size": size, "cutouts": [c.name for c in cutouts]}
    marker = (json.dumps(parameters, indent=1) + "\n").encode()
    if (out / MARKER).exists() and (out / MARKER).read_bytes() == marker:
        return table
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for cutout in cutouts:
        name = cutout.name.replace("/", "-")
        write_atomic(out / "images" / f"{name}.jpg", _photo(cutout, seed, size))
        kind, _, thing = cutout.name.rpartition("/")
        row = {"id": name, "image": f"images/{name}.jpg", "label": cutout.label}
        rows.append({**row, "kind": kind, "group": _without_number(thing.lower())})
    write_atomic(table, _table(rows))
    write_atomic(out / MARKER, marker)
    return table


def _without_number(thing: str) -> str:
    return re.sub(r"[-_]?\d+[a-z]?$", "", thing) or thing


def _find(stamps: Path) -> list[_CutOut]:
    """All photographic cut-outs in order of their paths, without exact duplicates."""
    if not stamps.is_dir():
        raise DataError(
            f"{stamps} does not exist, expected Debian's photo cut-outs: "
            "install them with `apt-get install tuxpaint-stamps-default`"
        )
    found: list[_CutOut] = []
    seen: set[str] = set()
    for path in sorted(stamps.rglob("*.png")):
        name = path.relative_to(stamps).with_suffix("").as_posix()
        if not name.startswith(tuple(f"{folder}/" for folder in _PHOTO_FOLDERS)):
            continue
        if any(word in name.lower() for word in _SKIPPED_WORDS) or name.startswith(_SKIPPED):
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            positive = name.startswith(tuple(f"{folder}/" for folder in _POSITIVE_FOLDERS))
            found.append(_CutOut(path, name, int(positive)))
    if {cutout.label for cutout in found} != {0, 1}:
        raise DataError(
            f"{stamps} holds {len(found)} usable cut-outs, expected both classes "
            "(road signs or vehicles, others): "
            "reinstall them with `apt-get install --reinstall tuxpaint-stamps-default`"
        )
    return found


def _photo(cutout: _CutOut, seed: int, size: int) -> bytes:
    """JPEG of one cut-out at a random position on a background of a random muted colour."""
    rng = generator_for(seed, "cutout", cutout.name)
    try:
        with Image.open(cutout.path) as opened:
            stamp = opened.convert("RGBA")
    except OSError as error:
        raise DataError(
            f"{cutout.path} cannot be read ({error}): "
            "reinstall it with `apt-get install --reinstall tuxpaint-stamps-default`"
        ) from error
    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    scale = rng.uniform(0.72, 0.92) * size / max(stamp.size)
    side = (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale)))
    stamp = stamp.resize(side, Image.Resampling.LANCZOS)
    base = rng.uniform(110, 220)
    r, g, b = (int(v) for v in (base + rng.uniform(-18, 18, 3)))
    photo = Image.new("RGB", (size, size), (r, g, b))
    left, top = (int(rng.integers(0, size - s + 1)) for s in stamp.size)
    photo.paste(stamp, (left, top), stamp)
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _table(rows: list[dict[str, object]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()
