"""What the launcher starts in tests: a toy run whose figures can be compared."""

import sys
from pathlib import Path

from support.toy import toy_config, toy_data, toy_model

from roadwork_dist.trainer.trainer import Trainer

if __name__ == "__main__":
    trainer = Trainer(
        toy_model(), toy_config(Path(sys.argv[1]), epochs=1, batch_size=8), toy_data(64), toy_data(24, seed=2)
    ).fit()
    print(f"rank {trainer.accelerator.process_index}: {trainer.engine.name}", flush=True)
