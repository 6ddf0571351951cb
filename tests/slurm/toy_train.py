"""What the tests of the launch scripts train: seconds, on any number of processes.

Takes the settings that the launch scripts hand to every training script, and ends with the exit codes
of ``roadwork-dist pretrain``.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from roadwork_dist.common.errors import InterruptedRunError
from roadwork_dist.trainer.events.callback import Callback

sys.path.append(str(Path(__file__).resolve().parents[1]))
from support.toy import NoisyData, toy_config, toy_data, toy_model

from roadwork_dist.trainer.trainer import Trainer


class Pace(Callback):
    """Slows steps down, and fails one rank, where the test asks for that."""

    def __init__(self, seconds: float, failing_rank: int) -> None:
        self.seconds, self.failing_rank = seconds, failing_rank

    def on_step_end(self, run: Any, result: Any) -> None:
        time.sleep(self.seconds)
        if run.accelerator.process_index == self.failing_rank and run.state.step == 2:
            raise RuntimeError("this rank fails, for the test")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--step_seconds", type=float, default=0)
    parser.add_argument("--failing_rank", type=int, default=-1)
    chosen = parser.parse_args()
    place = [os.environ.get(name, "-") for name in ("SLURMD_NODENAME", "RANK", "LOCAL_RANK", "WORLD_SIZE")]
    print("place", *place, flush=True)
    config = toy_config(
        chosen.output_dir,
        seed=chosen.seed,
        batch_size=chosen.batch_size,
        epochs=chosen.epochs,
        monitor="-loss",
    )
    pace = Pace(chosen.step_seconds, chosen.failing_rank)
    trainer = Trainer(toy_model(dropout=0.1), config, NoisyData(160), toy_data(20), callbacks=[pace])
    try:
        trainer.fit()
    except InterruptedRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
