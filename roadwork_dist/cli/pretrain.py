"""``roadwork-dist pretrain`` and ``launch/pretrain.py``."""

from collections.abc import Sequence

from roadwork_dist.cli.logs import set_up_logging
from roadwork_dist.config.io import parse_experiment


def run(arguments: Sequence[str]) -> int:
    """Train, evaluate and report one experiment; with no arguments the ``demo`` preset."""
    config = parse_experiment(arguments)
    set_up_logging()
    # After parsing: --help and mistakes are told without waiting for torch.
    from roadwork_dist.recipes.pretrain import run_experiment

    run_experiment(config)
    return 0
