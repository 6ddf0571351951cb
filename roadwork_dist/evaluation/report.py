"""Writes ``report.html``: one self-contained page with the metrics and errors of a detector."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from roadwork_dist.common.errors import DataError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.evaluation.errors_gallery import ViewsOf
from roadwork_dist.evaluation.history import (
    History,
    fold_charts,
    read_history,
    training_charts,
    training_facts,
)
from roadwork_dist.evaluation.predictions import as_predictions, read_predictions
from roadwork_dist.evaluation.report_section import EvaluatedSplit, section_of
from roadwork_dist.metrics.classification import best_threshold

if TYPE_CHECKING:
    import pandas as pd

GALLERIES = 2
"""Maximum number of photo sets whose worst errors are shown with their views, to limit the page size."""

PACKAGES = ("roadwork-dist", "torch", "accelerate", "transformers", "timm", "numpy")
"""Packages whose versions the report lists."""


@dataclass(frozen=True, kw_only=True)
class ReportInput:
    """All inputs of a report.

    Args:
        title: name of the run.
        synthetic: whether the photos are synthetic; the report says so at the top.
        history: lines of ``metrics.jsonl``.
        fold_histories: the same for every fold of a cross-validation, by name of the fold.
        sections: evaluated sets of photos; held-out ones are shown first.
        config_text: the resolved configuration as YAML.
        views_of: maps a photo's split and id to its views, [V, 3, S, S] uint8; None = photos not available.
        environment: machine and package versions of the run, name → text.
        bootstrap: resamples per interval.
        worst: number of worst errors shown per set.
        seed: seed of the resampling.
    """

    title: str
    synthetic: bool
    history: History = ()
    fold_histories: Mapping[str, History] = field(default_factory=dict)
    sections: Sequence[EvaluatedSplit] = ()
    config_text: str = ""
    views_of: ViewsOf | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    bootstrap: int = 2000
    worst: int = 10
    seed: int = 42


def write_report(path: Path, report: ReportInput) -> None:
    """Write the page atomically.

    Raises:
        DataError: the predictions of a section lack columns.
        OSError: the file cannot be written.
    """
    write_atomic(path, render(report).encode())


def render(report: ReportInput) -> str:
    """Render the page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    assets = files("roadwork_dist.evaluation") / "assets"
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((assets / "report.html.j2").read_text(encoding="utf-8"))
    ordered = sorted(report.sections, key=lambda split: not split.held_out)
    sections = [
        section_of(
            split,
            bootstrap=report.bootstrap,
            seed=report.seed,
            worst=report.worst if number < GALLERIES else 0,
            views_of=report.views_of,
        )
        for number, split in enumerate(ordered)
    ]
    return template.render(
        report=report,
        sections=sections,
        charts=training_charts(report.history) + fold_charts(report.fold_histories),
        facts=training_facts(report.history),
        css=Markup((assets / "report.css").read_text(encoding="utf-8")),
        written=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
    )


def report_from_run(
    run_dir: Path,
    *,
    views_of: ViewsOf | None = None,
    synthetic: bool | None = None,
    threshold: float | None = None,
) -> Path:
    """Write ``report.html`` from the files of a run folder.

    The threshold is the best one on the split ``val``, or 0.5 if there are no labelled photos in it.

    Args:
        run_dir: run folder with ``predictions.parquet`` and optionally ``metrics.jsonl`` (or those of
            ``fold-k/``) and ``config.yaml``.
        views_of: returns the views of a photo; None = the worst errors are listed without pictures.
        synthetic: whether the photos are synthetic; None = as recorded in the predictions.
        threshold: decision threshold to use instead.

    Returns:
        Path of the page.

    Raises:
        DataError: the folder or its predictions are missing or damaged.
    """
    import yaml

    if not run_dir.is_dir():
        raise DataError(
            f"{run_dir} is not a folder: expected a run folder, as --output_dir of a training run"
        )
    frame = read_predictions(run_dir / "predictions.parquet")
    config_file = run_dir / "config.yaml"
    config_text = config_file.read_text(encoding="utf-8") if config_file.is_file() else ""
    config = yaml.safe_load(config_text) or {}
    settings = {"bootstrap": 2000, "worst": 10, **(config.get("eval") or {})}
    path = run_dir / "report.html"
    report = ReportInput(
        title=run_dir.resolve().name,
        synthetic=bool(frame.attrs.get("synthetic", False)) if synthetic is None else synthetic,
        history=read_history(run_dir / "metrics.jsonl"),
        fold_histories={
            path.parent.name.replace("-", " "): read_history(path)
            for path in sorted(run_dir.glob("fold-*/metrics.jsonl"), key=lambda p: (len(p.parent.name), p))
        },
        sections=splits_of(frame, threshold),
        config_text=config_text,
        views_of=views_of,
        environment=environment_facts(),
        bootstrap=settings["bootstrap"],
        worst=settings["worst"],
        seed=config.get("seed", 42),
    )
    write_report(path, report)
    return path


SELECTION_SPLIT = "val"
"""Split on which checkpoints and the threshold are chosen."""


def splits_of(frame: "pd.DataFrame", threshold: float | None = None) -> list[EvaluatedSplit]:
    """The labelled splits of a run's predictions, with the threshold chosen on ``val``.

    Args:
        frame: predictions of all splits.
        threshold: use this one instead of choosing one.
    """
    from roadwork_dist.evaluation.evaluator import labels_and_probabilities, scored

    frame = as_predictions(frame)
    known = scored(frame)
    selection = known[known["split"] == SELECTION_SPLIT]
    chosen_on = SELECTION_SPLIT if threshold is None and len(selection) else None
    if chosen_on is not None:
        threshold = best_threshold(*labels_and_probabilities(selection))
    return [
        EvaluatedSplit(
            name=str(name),
            frame=frame[frame["split"] == name],
            threshold=0.5 if threshold is None else threshold,
            threshold_from=chosen_on,
            held_out=name not in (SELECTION_SPLIT, "train"),
            role=_role(str(name)),
        )
        for name in dict.fromkeys(known["split"])
    ]


def _role(name: str) -> str:
    if name == "train":
        return "The model was trained on these photos: their figures only show how well it fits them."
    if name == SELECTION_SPLIT:
        return "The best checkpoint was chosen on these photos too."
    if name == "target":
        return (
            "The coordinates of these photos, but not their labels, guided the sampling of training photos."
        )
    return ""


def environment_facts() -> dict[str, str]:
    """Machine and package versions of this process."""
    facts = {
        "Python": platform.python_version(),
        "System": platform.platform(terse=True),
        "CPU": platform.machine(),
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts
