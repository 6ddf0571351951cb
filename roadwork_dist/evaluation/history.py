"""Training history: reads ``metrics.jsonl`` and turns it into charts and summary facts."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from roadwork_dist.common.errors import DataError
from roadwork_dist.evaluation.charts import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Chart,
    Line,
    Scale,
    line_chart,
    thin,
)

History = Sequence[Mapping[str, Any]]
"""Lines of ``metrics.jsonl``; ``kind`` is train, val or skip."""

COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``; none if the file is missing. A truncated last line is skipped.

    Raises:
        DataError: a line before the last is not a JSON object.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    history = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline yet: a run is writing, or was killed while writing
                break
            raise DataError(f"{path}, line {number} is not JSON ({error}): fix or remove the line") from error
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}, line {number} is {entry!r}, expected a JSON object: fix or remove the line"
            )
        history.append(entry)
    return history


def value(entry: Mapping[str, Any], key: str) -> float:
    """A value of a line as a number; NaN if it is missing or not a number."""
    try:
        return float(entry.get(key, math.nan))
    except (TypeError, ValueError):
        return math.nan


def curve(history: History, kind: str, key: str) -> list[tuple[float, float]]:
    """(step, value) of the lines of one kind that have the key."""
    return [
        (value(entry, "step"), value(entry, key))
        for entry in history
        if entry.get("kind") == kind and key in entry
    ]


def training_charts(history: History) -> list[Chart]:
    """Loss, its terms, validation metrics and learning rate over optimizer steps; none without history."""
    steps = [value(entry, "step") for entry in history]
    known = [step for step in steps if math.isfinite(step)]
    if not known:
        return []
    reach = (0.0, max(max(known), 1.0))
    charts = [_loss_chart(history, reach), _parts_chart(history, reach), _validation_chart(history, reach)]
    rate = Line("learning rate", thin(curve(history, "train", "lr")), "c4")
    charts.append(line_chart("Learning rate", [rate], x_label="optimizer step", x_range=reach))
    return charts


def fold_charts(histories: Mapping[str, History]) -> list[Chart]:
    """Training loss of every fold over optimizer steps; none without history.

    Args:
        histories: name of the fold → lines of its ``metrics.jsonl``.
    """
    lines = [
        Line(name, thin(curve(history, "train", "loss")), COLOURS[i % len(COLOURS)])
        for i, (name, history) in enumerate(histories.items())
    ]
    ends = [step for line in lines for step, _ in line.points if math.isfinite(step)]
    if not ends:
        return []
    return [line_chart("Loss of each fold", lines, x_label="optimizer step", x_range=(0.0, max(ends)))]


def _loss_chart(history: History, reach: tuple[float, float]) -> Chart:
    lines = [
        Line("training", thin(curve(history, "train", "loss")), "c1"),
        Line("validation", curve(history, "val", "loss"), "c2", dots=True),
    ]
    skipped = [value(entry, "step") for entry in history if entry.get("kind") == "skip"]
    x = Scale(*reach, LEFT, WIDTH - RIGHT)
    marks = "".join(
        f'<path class="skip" d="M{x(step):.1f},{HEIGHT - 42:.1f}v-8"><title>skipped step</title></path>'
        for step in skipped
        if math.isfinite(step)
    )
    note = (
        f"Marks on the axis: steps skipped because their loss was not finite ({len(skipped)})."
        if skipped
        else ""
    )
    return line_chart("Loss", lines, x_label="optimizer step", x_range=reach, under=marks, note=note)


def _parts_chart(history: History, reach: tuple[float, float]) -> Chart:
    keys = list(dict.fromkeys(key for entry in history for key in entry if key.startswith("loss/")))
    lines = [
        Line(key.removeprefix("loss/"), thin(curve(history, "train", key)), COLOURS[i % len(COLOURS)])
        for i, key in enumerate(keys)
    ]
    return line_chart("Parts of the training loss", lines, x_label="optimizer step", x_range=reach)


def _validation_chart(history: History, reach: tuple[float, float]) -> Chart:
    lines = [
        Line("MCC", curve(history, "val", "mcc"), "c3", dots=True),
        Line("accuracy", curve(history, "val", "accuracy"), "c5", dots=True, dashed=True),
    ]
    lowest = min((y for line in lines for _, y in line.points if math.isfinite(y)), default=0.0)
    y_range = (0.0 if lowest >= 0 else -1.0, 1.0)
    return line_chart("Validation", lines, x_label="optimizer step", x_range=reach, y_range=y_range)


def training_facts(history: History) -> list[tuple[str, str]]:
    """Summary of a run as (name, text) pairs."""
    train = [entry for entry in history if entry.get("kind") == "train"]
    facts = []
    if train:
        facts.append(("Optimizer steps", f"{len(train)}"))
        facts.append(("Epochs", f"{len({entry.get('epoch') for entry in train})}"))
    validations = [point for point in curve(history, "val", "mcc") if math.isfinite(point[1])]
    if validations:
        step, best = max(validations, key=lambda point: point[1])
        facts.append(("Best validation MCC", f"{best:.3f} at step {step:.0f}"))
    for name, key, form in (
        ("Photos per second", "samples_per_s", "{:.1f}"),
        ("Waiting for data", "data_wait", "{:.1%}"),
    ):
        known = [v for entry in train if math.isfinite(v := value(entry, key))]
        if known:
            facts.append((name, form.format(median(known))))
    memory = [v for entry in train if math.isfinite(v := value(entry, "memory_mb"))]
    if memory:
        facts.append(("Peak memory", f"{max(memory) / 1024:.2f} GiB"))
    skipped = sum(entry.get("kind") == "skip" for entry in history)
    if skipped:
        facts.append(("Skipped steps", f"{skipped}"))
    return facts
