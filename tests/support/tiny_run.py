"""A tiny synthetic set and what trains on it in seconds."""

from pathlib import Path

from roadwork_dist.demo.synthetic.dataset import SyntheticSet, write_synthetic


def tiny_set(folder: Path) -> SyntheticSet:
    """Eight photos to train on, four to validate on, four target photos; 160x120 px, synthetic."""
    return write_synthetic(
        folder,
        n_train=8,
        n_val=4,
        n_target=4,
        n_large=0,
        workers=1,
        size=(160, 120),
        large_size=(320, 240),
    )


def tiny_arguments(data: SyntheticSet, folder: Path) -> list[str]:
    """Settings of ``pretrain``: one epoch of a small head, the global view only, no sentence encoder."""
    return [
        f"--data.train={data.train}",
        f"--data.val={data.val}",
        f"--data.target={data.target}",
        f"--output_dir={folder / 'run'}",
        f"--features.dir={folder / 'features'}",
        *("--epochs=1", "--batch_size=4", "--workers=0", "--device=cpu", "--views.policy=global"),
        *("--augment.copies=1", "--gps.on_shortfall=continue", "--eval.bootstrap=100"),
        *("--model.width=64", "--model.heads=1", "--model.layers=1", "--model.metadata=false"),
    ]
