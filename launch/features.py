"""Compute features on many processes: ``accelerate launch launch/features.py [--config NAME] …``."""

import sys

from roadwork_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["features", *sys.argv[1:]]))
