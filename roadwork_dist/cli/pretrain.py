"""``roadwork-dist pretrain`` and ``launch/pretrain.py``: trains, evaluates and reports an experiment."""

from collections.abc import Sequence

from roadwork_dist.cli.logs import set_up_logging
from roadwork_dist.config.io import parse_experiment


def run(arguments: Sequence[str]) -> int:
    """Train, evaluate and report one experiment; without arguments the ``demo`` preset."""
    config = parse_experiment(arguments)
    set_up_logging()
    # Imported after parsing, so that --help and argument errors do not wait for torch.
    from roadwork_dist.recipes.pretrain import run_experiment

    run_experiment(config)
    return 0
