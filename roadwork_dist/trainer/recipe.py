"""The settings that decide a run's weights: a run is resumed with those that it was started with."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.events.state import TrainState
from roadwork_dist.trainer.optim.schedules import Schedule

logger = logging.getLogger(__name__)


def recipe_of(config: TrainConfig) -> dict[str, Any]:
    """Dotted names and values of the settings that decide weights; JSON-able."""
    settings = json.loads(json.dumps(asdict(config)))
    if not config.ema.enabled:
        del settings["ema"]  # an average may be switched on later
    return {name: value for name, value in _flat(settings) if not _is_free(name, config)}


def keep_recipe(config: TrainConfig, was: Mapping[str, Any] | None, run_dir: Path) -> None:
    """Refuse to resume with another recipe, or say what is different where that was asked for.

    Args:
        config: of now; ``resume: force`` takes another recipe.
        was: :func:`recipe_of` of the checkpoint; None = it is of version 0.1, which kept none.
        run_dir: for the message.

    Raises:
        CheckpointError: names every setting that changed, with both values.
    """
    if was is None:
        return
    now = recipe_of(config)
    # A setting that only one of the two versions has is not a change of the user's.
    changed = [
        f"{name} was {was[name]!r}, is {now[name]!r}"
        for name in now
        if name in was and was[name] != now[name]
    ]
    if not changed:
        return
    if config.resume == "force":
        logger.warning("resuming %s with another recipe: %s", run_dir, "; ".join(changed))
        return
    raise CheckpointError(
        f"cannot resume the checkpoint in {run_dir} with another recipe: {'; '.join(changed)}; set it back, "
        "choose another output_dir, or set resume to 'force'"
    )


def report_epochs(was: int, now: int, before: Schedule, after: Schedule, step: int) -> None:
    """Say what another number of epochs does to a run that is resumed: the schedule has another end.

    Args:
        was: epochs that the run was to have.
        now: epochs that it is to have.
        before: learning rates with the former number.
        after: those with the present one.
        step: optimizer steps taken so far.
    """
    if was != now:
        logger.warning(
            "epochs was %d, is %d: the schedule now ends at step %d, so the learning rate continues at %.3g, "
            "where it would have been %.3g",
            was,
            now,
            after.total_steps,
            after.lr_at(step),
            before.lr_at(min(step, before.total_steps)),
        )


def report_finished(run_dir: Path, state: TrainState, monitor: str) -> None:
    """Say that there is nothing to train any more."""
    best = "" if state.best is None else f", best {monitor} {abs(state.best):.4f} at step {state.best_step}"
    logger.warning(
        "the run in %s is finished (%d epochs, %d steps%s), so nothing is trained: raise epochs, or choose "
        "another output_dir",
        run_dir,
        state.epoch,
        state.step,
        best,
    )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is_free(name: str, config: TrainConfig) -> bool:
    """Whether a setting or a group that it belongs to may change from start to start."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in config.free for length in range(1, len(parts) + 1))
