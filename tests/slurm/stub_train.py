"""Stands in for a training where only signals matter: runs until it is asked to stop, then "has saved"."""

import os
import signal
import sys
import time
from types import FrameType

NAMES = ("SIGTERM", "SIGUSR1")


def save(number: int, frame: FrameType | None) -> None:
    print(f"error: asked to stop by {signal.Signals(number).name}: state saved at step 1", flush=True)
    os._exit(75)


if __name__ == "__main__":
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        sys.exit(0)
    for name in NAMES:
        signal.signal(getattr(signal, name), save)
    print("ready", flush=True)
    time.sleep(300)
