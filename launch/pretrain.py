"""Train the detector: ``accelerate launch launch/pretrain.py [--config NAME] [--optim.lr 1e-4] …``."""

import sys

from roadwork_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
