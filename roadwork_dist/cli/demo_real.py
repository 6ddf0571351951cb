"""``roadwork-dist demo-real``: cross-validation on real photographs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from roadwork_dist.cli.logs import set_up_logging
from roadwork_dist.config.io import parse_experiment

PRESET = "demo_real"


def run(arguments: Sequence[str]) -> int:
    """Write the photos (once), then train and evaluate out of fold.

    All arguments except ``--photos`` and ``--stamps`` are settings of ``pretrain``.
    """
    from roadwork_dist.demo.cutouts import STAMPS, write_cutouts

    parser = argparse.ArgumentParser(prog="roadwork-dist demo-real", add_help=False, allow_abbrev=False)
    parser.add_argument("--photos", type=Path, default=Path("real-data"))
    parser.add_argument("--stamps", type=Path, default=STAMPS)
    options, settings = parser.parse_known_args(arguments)
    config = parse_experiment(
        ["--config", PRESET, f"--data.train={options.photos / 'metadata.csv'}", *settings],
        prog="roadwork-dist demo-real [--photos FOLDER] [--stamps FOLDER]",
    )
    set_up_logging()
    table = write_cutouts(options.photos, stamps=options.stamps)
    print(
        f"real photographs: {table} (cut-outs on a plain ground; label 1 = road signs, traffic cones and "
        "vehicles, 0 = everything else)"
    )
    from roadwork_dist.recipes.crossval import run_crossval

    run_crossval(config)
    return 0
