"""``roadwork-dist shard``: writes photos as WebDataset tars with an index."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from roadwork_dist.cli.arguments import Parser, whole_number
from roadwork_dist.cli.sizes import size

if TYPE_CHECKING:
    from roadwork_dist.storage.shards.write import Written

SETTINGS = ("--config", "--device", "--data.", "--views.", "--backbone.")
"""Settings of ``pretrain`` that this command accepts: exact names, and groups that end in a dot."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MOST_SHOWN = 10


def run(arguments: Sequence[str]) -> int:
    """Write the set, or the missing part of it."""
    words, settings = split_settings(arguments)
    options = _parser().parse(words)
    from roadwork_dist.config.io import parse_experiment

    config = parse_experiment(settings, prog="roadwork-dist shard")
    # Imported after parsing, so that argument errors do not wait for torch.
    from roadwork_dist.recipes.progress import progress_bar
    from roadwork_dist.recipes.shards import Compaction
    from roadwork_dist.sources import is_synthetic, load_manifest
    from roadwork_dist.storage.shards.plan import ShardOptions
    from roadwork_dist.storage.shards.write import write_shards

    manifest = load_manifest(options.source, config.data, name="train", setting="SOURCE")
    compaction = Compaction(config, samples=options.sample) if options.compact else None
    form = ShardOptions(
        size=options.size,
        name=options.name,
        shuffle=options.shuffle,
        compact=None if compaction is None else compaction.geometry,
        quality=options.quality,
        decode=not options.no_decode,
        max_pixels=config.data.max_pixels,
        max_share=config.data.max_unreadable_share,
        synthetic=is_synthetic(options.source, config.data),
    )
    with progress_bar(f"writing shards of {manifest.name}") as on_progress:
        done = write_shards(manifest, options.out, form, workers=options.workers, on_progress=on_progress)
    _print_summary(done, options.out)
    if compaction is not None:
        print(f"photos are {done.source_bytes / max(1, done.photo_bytes):.1f}x smaller than before")
        for line in compaction.loss(manifest, options.out):
            print(line)
    return 0


def split_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into the arguments of this command, and those that are settings of an experiment."""
    own: list[str] = []
    settings: list[str] = []
    words = iter(arguments)
    for word in words:
        name = word.split("=")[0]
        if not any(name == each or (each.endswith(".") and name.startswith(each)) for each in SETTINGS):
            own.append(word)
            continue
        settings.append(word)
        if "=" not in word:
            settings += [value for value in [next(words, None)] if value is not None]
    return own, settings


def byte_size(text: str) -> int:
    """Bytes of a size such as ``1GB``, ``500 MB`` or ``2GiB``, for ``type=`` of an argument.

    Raises:
        argparse.ArgumentTypeError: it is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", text.strip().upper())
    if found is None or (found[3] and not found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 1GB, 500MB or 2GiB")
    power = list(_UNITS).index(found[2])
    return int(float(found[1]) * (1024**power if found[3] else _UNITS[found[2]]))


def _print_summary(done: "Written", out: Path) -> None:
    shards = done.shards
    total = sum(shard.bytes for shard in shards.shards)
    were = f"{done.written} written, {done.kept} were there" if done.kept else f"{done.written} written"
    print(f"{out}: {len(shards.shards)} shards ({were}), {shards.samples:,} photos, {size(total)}")
    if shards.unreadable:
        photos = shards.samples + len(shards.unreadable)
        print(
            f"{len(shards.unreadable):,} of {photos:,} photos are unreadable and left out:", file=sys.stderr
        )
        for _, reason in shards.unreadable[:_MOST_SHOWN]:
            print(f"  {reason}", file=sys.stderr)
        if len(shards.unreadable) > _MOST_SHOWN:
            print(
                f"  and {len(shards.unreadable) - _MOST_SHOWN} more, see {out}/shards.json", file=sys.stderr
            )


def _parser() -> Parser:
    parser = Parser(
        "roadwork-dist shard",
        "Write photos as WebDataset tars with an index. A restart resumes the work; the output does not "
        "depend on the number of processes. The settings --data.*, --views.*, --backbone.*, --config and "
        "--device of pretrain are also accepted.",
    )
    parser.add_argument("source", metavar="SOURCE", help="as for --data.train: a table, a folder, hf:…")
    parser.add_argument("out", metavar="OUT", type=Path, help="output folder, empty or with the same set")
    parser.add_argument(
        "--size", type=byte_size, default="1GB", help="largest shard, such as 500MB (default: %(default)s)"
    )
    processes = min(8, len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--workers",
        type=whole_number(0),
        default=processes,
        help="processes (default here: %(default)s)",
    )
    parser.add_argument("--name", default="shard", help="prefix of the tar names (default: %(default)s)")
    parser.add_argument(
        "--shuffle",
        metavar="SEED",
        type=whole_number(0),
        help="shuffle the photos, which suits reading shard by shard (default: the order of the source)",
    )
    parser.add_argument(
        "--no_decode",
        action="store_true",
        help="check headers only, instead of decoding every photo before it is written",
    )
    parser.add_argument(
        "--compact",
        action="store_true",
        help="store the resized images that views are cut from (long side views.scale times views.size) "
        "instead of the photos",
    )
    parser.add_argument(
        "--quality",
        type=whole_number(1),
        default=95,
        help="quality of compact JPEGs, 4:4:4 (default: %(default)s)",
    )
    parser.add_argument(
        "--sample",
        metavar="PHOTOS",
        type=whole_number(0),
        default=16,
        help="photos on which --compact measures the change of features; 0 = skip (default: %(default)s)",
    )
    return parser
