"""``roadwork-dist report``: writes the report of a run again."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from roadwork_dist.cli.arguments import Parser
from roadwork_dist.cli.runs import run_config, run_folder

if TYPE_CHECKING:
    from roadwork_dist.recipes.pictures import PicturesOfRun


def run(arguments: Sequence[str]) -> int:
    """Write ``report.html`` from the run folder, with pictures if the photos are available."""
    parser = Parser(
        "roadwork-dist report",
        "Write report.html of a run folder again, from its predictions and figures. The worst errors are "
        "shown with their views if the photos are still where the run read them. Relative paths in its "
        "config.yaml start from the current folder.",
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
    """Pictures cut into views as for the saved model; None if the run has saved no model."""
    from roadwork_dist.config.experiment import ViewsConfig
    from roadwork_dist.detector.pretrained import CONFIG_FILE, read_config
    from roadwork_dist.recipes.pictures import PicturesOfRun

    saved = [*folder.glob(f"best/{CONFIG_FILE}"), *sorted(folder.glob(f"fold-*/*/{CONFIG_FILE}"))]
    views = read_config(saved[0].parent).extra.get("views") if saved else None
    return None if views is None else PicturesOfRun(run_config(folder), ViewsConfig(**views))
