"""``roadwork-dist synth``: a synthetic data set."""

from collections.abc import Sequence
from pathlib import Path

from roadwork_dist.cli.arguments import Parser, whole_number

_LARGE = 48


def run(arguments: Sequence[str]) -> int:
    """Render the set, once."""
    parser = Parser(
        "roadwork-dist synth",
        "Render a synthetic data set: street scenes as JPEGs with EXIF, exact masks, metadata of "
        "which most is null, and splits train, val and target. A complete set is left alone.",
    )
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument(
        "--seed", type=whole_number(0), default=42, help="seed of everything (default: %(default)s)"
    )
    parser.add_argument("--train", type=whole_number(0), default=264, help="photos to train on (%(default)s)")
    parser.add_argument("--val", type=whole_number(0), default=96, help="photos to validate on (%(default)s)")
    parser.add_argument(
        "--target", type=whole_number(0), default=40, help="photos around the target cities (%(default)s)"
    )
    parser.add_argument(
        "--large",
        type=whole_number(0),
        help=f"photos of 4032x3024; others are half ({_LARGE}, or all there are if they are fewer)",
    )
    parser.add_argument("--workers", type=whole_number(0), default=2, help="processes (%(default)s)")
    options = parser.parse(arguments)
    photos = options.train + options.val + options.target
    if not photos:
        parser.error("--train, --val and --target are all 0, expected at least one photo")
    large = min(_LARGE, photos) if options.large is None else options.large
    if large > photos:
        parser.error(f"--large is {large}, expected 0 to the {photos} photos there are in all")
    from roadwork_dist.demo.synthetic.dataset import write_synthetic
    from roadwork_dist.recipes.progress import progress_bar

    with progress_bar("rendering synthetic photos") as tell:
        made = write_synthetic(
            options.folder,
            seed=options.seed,
            n_train=options.train,
            n_val=options.val,
            n_target=options.target,
            n_large=large,
            workers=options.workers,
            progress=tell,
        )
    was = "rendered" if made.rendered else "already there"
    print(f"{was}: {made.train.parent} (synthetic photos; train.csv, val.csv, target.csv)")
    return 0
