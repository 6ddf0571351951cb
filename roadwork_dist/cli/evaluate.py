"""``roadwork-dist evaluate``: a trained run on its own or on other photos."""

from collections.abc import Sequence
from pathlib import Path

from roadwork_dist.cli.arguments import Parser
from roadwork_dist.cli.runs import run_folder


def run(arguments: Sequence[str]) -> int:
    """Predict with the best weights and print figures with their intervals."""
    parser = Parser(
        "roadwork-dist evaluate",
        "Evaluate the best weights of a run again: on its own validation and target photos, or on others "
        "with labels. Figures come with 95 % bootstrap intervals. Paths of the run's config.yaml start "
        "from the present folder.",
    )
    parser.add_run("the one chosen on val")
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="photos with labels instead of the run's own: what --data.train takes",
    )
    parser.add_argument(
        "--image_root", metavar="DIR", help="folder that relative image paths of SOURCE start from"
    )
    parser.add_select()
    parser.add_argument(
        "--output",
        metavar="FILE.json",
        type=Path,
        help="where figures go, and beside them predictions as .parquet (default: the run folder's own "
        "files, or evaluations/ in it with --data, --threshold or --views.select)",
    )
    options = parser.parse(arguments)
    folder = run_folder(options.run)
    if options.output is not None and options.output.suffix != ".json":
        parser.error(f"--output {options.output} does not end in .json")
    if options.image_root is not None and options.data is None:
        parser.error("--image_root says where the photos of --data are, and there is no --data")
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
