"""``roadwork-dist evaluate``: evaluates a trained run on its own or on other photos."""

from collections.abc import Sequence
from pathlib import Path

from roadwork_dist.cli.arguments import Parser
from roadwork_dist.cli.runs import run_folder


def run(arguments: Sequence[str]) -> int:
    """Predict with the best weights and print metrics with their intervals."""
    parser = Parser(
        "roadwork-dist evaluate",
        "Evaluate the best weights of a run again, on its own validation and target photos or on other "
        "labelled ones. Figures come with 95 % bootstrap intervals. Relative paths in the run's config.yaml "
        "start from the current folder.",
    )
    parser.add_run("the one chosen on val")
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="labelled photos to use instead of the run's own, as for --data.train",
    )
    parser.add_argument(
        "--image_root", metavar="DIR", help="folder that relative image paths in SOURCE start from"
    )
    parser.add_select()
    parser.add_argument(
        "--output",
        metavar="FILE.json",
        type=Path,
        help="file for the figures; predictions go next to it as .parquet (default: the run folder's own "
        "files, or its evaluations/ with --data, --threshold or --views.select)",
    )
    options = parser.parse(arguments)
    folder = run_folder(options.run)
    if options.output is not None and options.output.suffix != ".json":
        parser.error(f"--output {options.output} does not end in .json")
    if options.image_root is not None and options.data is None:
        parser.error("--image_root is the folder of the photos of --data, but --data is missing: add it")
    from roadwork_dist.cli.logs import set_up_logging
    from roadwork_dist.recipes.evaluate import evaluate_run

    set_up_logging()
    files = evaluate_run(
        folder,
        source=options.data,
        image_root=options.image_root,
        threshold=options.threshold,
        select=options.select,
        output=options.output,
    )
    print(f"figures: {files.figures}\npredictions: {files.predictions}")
    return 0
