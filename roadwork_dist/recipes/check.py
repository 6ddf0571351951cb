"""Checks the data of a run before training (tables, photos, sampling) and lists all problems at once."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from roadwork_dist.common.errors import DataError
from roadwork_dist.config.batch import UNLABELLED
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.photos.check import check_images, drop_unreadable
from roadwork_dist.photos.manifest import Manifest
from roadwork_dist.recipes.data import Manifests, split_off
from roadwork_dist.recipes.progress import progress_bar
from roadwork_dist.sources import load_manifest
from roadwork_dist.sources.gps import gps_weights
from roadwork_dist.storage.shards.index import is_shard_set, read_set
from roadwork_dist.storage.shards.verify import verify_shards

Say = Callable[[str], None]
MOST_THREADS = 8


def check_source(source: str, config: ExperimentConfig, say: Say) -> list[str]:
    """Decode every photo of one source, print a report, and list the problems that would stop a run.

    Args:
        source: any form that ``data.train`` accepts.
        config: columns, image root and limits.
        say: called with each line of the report.
    """
    problems: list[str] = []
    with _quiet():
        manifest = _checked("train", source, config, say, problems, setting="SOURCE")
    if manifest is not None and (manifest.labels == UNLABELLED).all():
        say(
            f"  no row has a label (column {config.data.columns.label!r}): these photos can be predicted or "
            "used as data.target, but not for training or evaluation"
        )
    return problems


def check_experiment(config: ExperimentConfig, say: Say) -> list[str]:
    """Like :func:`check_source` for all sources of an experiment, and for its split and sampling.

    Args:
        config: the experiment.
        say: called with each line of the report.
    """
    problems: list[str] = []
    with _quiet():
        found: dict[str, Manifest] = {}
        for role in ("train", "val", "target"):
            source = getattr(config.data, role)
            manifest = _checked(role, source, config, say, problems) if source else None
            if manifest is not None:
                found[role] = manifest
        if not problems:
            _check_together(found, config, say, problems)
    return problems


def _checked(
    role: str,
    source: str,
    config: ExperimentConfig,
    say: Say,
    problems: list[str],
    setting: str | None = None,
) -> Manifest | None:
    """The readable rows of a source; None if it cannot be used, which is added to ``problems``."""
    try:
        manifest = load_manifest(source, config.data, name=role, setting=setting)
        if is_shard_set(Path(source)):
            _check_shards(Path(source), say, problems)
        with progress_bar(f"checking {manifest.name}") as advance:
            report = check_images(
                manifest,
                max_share=1.0,
                max_pixels=config.data.max_pixels,
                workers=_threads(),
                on_progress=advance,
            )
    except DataError as error:
        problems.append(str(error))
        return None
    lines = report.lines()
    say(f"{role}: {lines[0]}" if setting is None else lines[0])
    for line in lines[1:]:
        say(line)
    try:
        reasons = dict(report.unreadable)
        broken = {row: reasons[id_] for row, id_ in enumerate(manifest.ids) if id_ in reasons}
        drop_unreadable(manifest, broken, config.data.max_unreadable_share)
        return report.readable if role == "target" or setting else report.readable.labelled()
    except DataError as error:
        problems.append(str(error))
        return None


def _check_shards(folder: Path, say: Say, problems: list[str]) -> None:
    """Check the tars of a shard set: reports every damaged tar, and adds one problem for all of them."""
    with progress_bar(f"checking the tars of {folder}") as advance:
        found = verify_shards(folder, workers=_threads(), on_progress=advance)
    left_out = read_set(folder).unreadable
    if left_out:
        say(f"  {len(left_out):,} photos were left out when it was written, such as: {left_out[0][1]}")
    for problem in found:
        say(f"  {folder / problem.shard}: {problem.reason}")
    if found:
        are = "1 tar is" if len(found) == 1 else f"{len(found)} tars are"
        problems.append(
            f"{folder}: {are} not as shards.json and the index describe: copy the damaged ones again, or run "
            "the same `roadwork-dist shard` again, which rewrites only those"
        )


def _threads() -> int:
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))


def _check_together(
    found: dict[str, Manifest], config: ExperimentConfig, say: Say, problems: list[str]
) -> None:
    """Check what depends on several sources: overlap, validation split, label variety, GPS weighting."""
    train, target = found["train"], found.get("target")
    try:
        if "val" in found:
            manifests = Manifests(train, found["val"], target)
        else:
            manifests = Manifests(*split_off(train, config), target)
            say(f"split off from train: {len(manifests.val):,} for validation, {len(manifests.train):,} stay")
        for role, manifest in (("train", manifests.train), ("val", manifests.val)):
            if len(set(manifest.labels.tolist()) - {UNLABELLED}) < 2:
                say(f"  {role}: all labels are the same, so there is nothing to distinguish")
        if config.gps.enabled:
            _, report = gps_weights(manifests.train, target, config.gps, seed=config.seed)
            for line in report.lines():
                say(line)
    except DataError as error:
        problems.append(str(error))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress log messages that the report repeats (words read as null, photos left out)."""
    logger = logging.getLogger(__name__.partition(".")[0])
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
