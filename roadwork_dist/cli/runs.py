"""Finding a run folder and its settings from a path on the command line."""

from pathlib import Path
from typing import TYPE_CHECKING

from roadwork_dist.common.errors import DataError

if TYPE_CHECKING:
    from roadwork_dist.config.experiment import ExperimentConfig

CONFIG_FILE = "config.yaml"


def run_folder(path: Path) -> Path:
    """The run folder for a path to it or to its ``best/``.

    Raises:
        DataError: it is not a run folder.
    """
    for folder in (path, path.parent) if path.name == "best" else (path,):
        if (folder / CONFIG_FILE).is_file():
            return folder
    what = f"holds no {CONFIG_FILE}" if path.is_dir() else "is not a folder"
    raise DataError(f"{path} {what}: expected a run folder, as --output_dir of a training run")


def run_config(folder: Path) -> "ExperimentConfig":
    """The resolved settings of a run.

    Raises:
        ConfigError: they are not settings of an experiment with photos.
    """
    from roadwork_dist.config.io import load_experiment

    return load_experiment(folder / CONFIG_FILE)
