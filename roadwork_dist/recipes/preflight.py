"""Early checks of settings that the Trainer would refuse only after hours of feature extraction."""

from pathlib import Path

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.detector.fusions import FUSIONS, fusion_name
from roadwork_dist.detector.losses.composite import check_part_names
from roadwork_dist.detector.task import RoadworkTask
from roadwork_dist.photos.nvjpeg import check_nvjpeg
from roadwork_dist.trainer.checkpoint.checkpoint_store import CheckpointStore
from roadwork_dist.trainer.optim.optimizers import OPTIMIZERS
from roadwork_dist.trainer.optim.schedules import SHAPES


def check_recipe(config: ExperimentConfig) -> None:
    """Refuse a run that could not start; reads file names only.

    Raises:
        ConfigError: no optimizer, schedule, fusion, part of the loss or validation figure has the
            configured name, GPU decoding is configured but not available, or ``resume`` is ``never`` and the
            run folder holds checkpoints.
    """
    _ = OPTIMIZERS[config.optim.name], SHAPES[config.schedule.name]
    _ = FUSIONS[fusion_name(config.model)]
    check_part_names(config.loss)
    if config.views.decoder == "nvjpeg":
        check_nvjpeg(config.workers)
    figures = ("loss", *RoadworkTask.figures)
    if config.monitor.removeprefix("-") not in figures:
        raise ConfigError(
            f"monitor is {config.monitor!r}, expected one of {', '.join(figures)} (with a leading '-' where "
            "lower is better)"
        )
    steps = CheckpointStore(Path(config.output_dir) / "checkpoints").steps()
    if config.resume == "never" and steps:
        raise ConfigError(
            f"resume is 'never' but {config.output_dir} holds checkpoints up to step {steps[-1]}: choose "
            "another output_dir, delete the folder, or leave resume at 'auto'"
        )
