"""``roadwork-dist report``: a run's report anew."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from roadwork_dist.cli.arguments import Parser
from roadwork_dist.cli.runs import run_config, run_folder

if TYPE_CHECKING:
    from roadwork_dist.recipes.pictures import PicturesOfRun


def run(arguments: Sequence[str]) -> int:
    """Write ``report.html`` from what the run folder holds, with pictures where the photos are at hand."""
    parser = Parser(
        "roadwork-dist report",
        "Write report.html of a run folder anew, from its predictions and figures. The worst errors are "
        "shown with their views where the photos still lie where the run found them (paths of its "
        "config.yaml start from the present folder).",
    )
    parser.add_run("the best one on val")
    options = parser.parse(arguments)
    folder = run_folder(options.run)
    from roadwork_dist.cli.logs import set_up_logging
    from roadwork_dist.evaluation.report import report_from_run

    set_up_logging()
    print(f"report: {report_from_run(folder, views_of=_pictures(folder), threshold=options.threshold)}")
    return 0


def _pictures(folder: Path) -> "PicturesOfRun | None":
    """Pictures cut as the saved model sees them; None where the run has saved none."""
    from roadwork_dist.config.experiment import ViewsConfig
    from roadwork_dist.detector.pretrained import CONFIG_FILE, read_config
    from roadwork_dist.recipes.pictures import PicturesOfRun

    saved = [*folder.glob(f"best/{CONFIG_FILE}"), *sorted(folder.glob(f"fold-*/*/{CONFIG_FILE}"))]
    views = read_config(saved[0].parent).extra.get("views") if saved else None
    return None if views is None else PicturesOfRun(run_config(folder), ViewsConfig(**views))
