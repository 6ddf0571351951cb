"""``roadwork-dist synth``: renders a synthetic data set."""

from collections.abc import Sequence
from pathlib import Path

from roadwork_dist.cli.arguments import Parser, whole_number

_LARGE = 48


def run(arguments: Sequence[str]) -> int:
    """Render the set unless it is complete."""
    parser = Parser(
        "roadwork-dist synth",
        "Render a synthetic data set: street scenes as JPEGs with EXIF, exact masks, mostly missing "
        "metadata, and the splits train, val and target. A complete set is not rendered again.",
    )
    parser.add_argument("folder", type=Path, help="output folder")
    parser.add_argument("--seed", type=whole_number(0), default=42, help="random seed (default: %(default)s)")
    parser.add_argument("--train", type=whole_number(0), default=264, help="training photos (%(default)s)")
    parser.add_argument("--val", type=whole_number(0), default=96, help="validation photos (%(default)s)")
    parser.add_argument(
        "--target", type=whole_number(0), default=40, help="photos near the target cities (%(default)s)"
    )
    parser.add_argument(
        "--large",
        type=whole_number(0),
        help=f"photos of 4032x3024; the others have half the side ({_LARGE}, or all if there are fewer)",
    )
    parser.add_argument("--workers", type=whole_number(0), default=2, help="processes (%(default)s)")
    options = parser.parse(arguments)
    photos = options.train + options.val + options.target
    if not photos:
        parser.error("--train, --val and --target are all 0, expected at least one photo")
    large = min(_LARGE, photos) if options.large is None else options.large
    if large > photos:
        parser.error(f"--large is {large}, expected 0 to {photos}, the number of all photos")
    from roadwork_dist.demo.synthetic.dataset import write_synthetic
    from roadwork_dist.recipes.progress import progress_bar

    with progress_bar("rendering synthetic photos") as show_progress:
        made = write_synthetic(
            options.folder,
            seed=options.seed,
            n_train=options.train,
            n_val=options.val,
            n_target=options.target,
            n_large=large,
            workers=options.workers,
            progress=show_progress,
        )
    was = "rendered" if made.rendered else "already there"
    print(f"{was}: {made.train.parent} (synthetic photos; train.csv, val.csv, target.csv)")
    return 0
