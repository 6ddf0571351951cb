"""What holds for every test: one thread a process, no hub, no tracker that phones home."""

import os
from pathlib import Path
from typing import Any

# Before anything imports the libraries that read them, and inherited by processes that tests start.
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
)

import pytest
import torch
from support.collected import MODULES

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MODULES] = set()


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> None:
    parent.config.stash[MODULES].add(module_path)
