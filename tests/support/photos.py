"""A small synthetic set and settings that train on it in seconds."""

from pathlib import Path

from roadwork_dist.config.experiment import ExperimentConfig
from roadwork_dist.config.io import parse_experiment
from roadwork_dist.demo.synthetic.dataset import write_synthetic


def write_small_set(folder: Path) -> Path:
    """24 + 12 + 6 synthetic photos of 256x192 px."""
    write_synthetic(
        folder, n_train=24, n_val=12, n_target=6, n_large=0, workers=1, size=(256, 192), large_size=(256, 192)
    )
    return folder


def small_experiment(photos: Path, run_dir: Path, *overrides: str) -> ExperimentConfig:
    """Twelve views of 64 px through the real backbone, a small head with all its parts."""
    settings = {
        "output_dir": run_dir,
        "data.train": photos / "train.csv",
        "data.val": photos / "val.csv",
        "data.target": photos / "target.csv",
        "features.dir": photos / "features",
        "gps.on_shortfall": "continue",
        "views.size": 64,
        "model.width": 64,
        "model.heads": 4,
        "model.layers": 1,
        "batch_size": 8,
        "epochs": 2,
        "workers": 0,
        "device": "cpu",
        "eval.bootstrap": 100,
        "checkpoint.every_steps": 2,
    }
    return parse_experiment([f"--{name}={value}" for name, value in settings.items()] + list(overrides))
