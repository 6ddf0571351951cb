"""Search for the largest micro-batch that fits into memory.

An optimizer step keeps its rows: a rank's share of them (``batch_size * accumulation``) is only split into
micro-batches of another size. Random draws inside the model (dropout) do depend on that size, so a resumed
run keeps the size that it started with.
"""

import gc
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from roadwork_dist.common.errors import ConfigError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.common.undisturbed import undisturbed
from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.engine.collectives import broadcast_object, sum_over_ranks
from roadwork_dist.trainer.engine.precision import in_precision
from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.feed.dataset import MapDataset
from roadwork_dist.trainer.feed.loader import load_batches
from roadwork_dist.trainer.optim.optimizers import OPTIMIZERS

logger = logging.getLogger(__name__)

GRADIENT = AVERAGE = 4
"""Bytes per trained parameter of the gradient and of the average, both fp32."""

HEADROOM = 0.05
"""Share of a GPU's memory that is left free for later growth (fragmentation, batches with more views)."""


class Tunable(Run, Protocol):
    """What a trial needs from the Trainer besides :class:`Run`."""

    train_data: MapDataset
    collate: Callable[[list[Any]], Any] | None
    task: Any

    def use_micro_batches(self, batch_size: int) -> None:
        """Split each step's rows into micro-batches of this size from now on."""


class BatchSizeSearch(Callback):
    """Chooses the micro-batch size before the model is distributed over the ranks.

    Every rank tries the whole model by itself, without collectives, so a rank that runs out of memory
    blocks no other. The largest size that fits on all ranks is used. Trials leave weights, optimizer
    moments, batch statistics and random states unchanged. Sharding engines need less memory than the trial.
    """

    filename = "batch_size.json"

    def __init__(self) -> None:
        self._choice: dict[str, int] | None = None

    def on_setup(self, run: Run) -> None:
        """Use the size stored in the run folder, else search.

        Raises:
            ConfigError: not even one row fits, or the stored choice cannot be read.
        """
        tunable = cast(Tunable, run)
        share = run.config.batch_size * run.config.accumulation
        is_main = run.accelerator.is_main_process
        stored, refused = None, None
        if is_main and run.config.resume != "never":
            try:
                stored = stored_choice(run.run_dir / self.filename)
            except ConfigError as error:
                refused = str(error)
        # Rank 0 reads for all ranks, so they use the same size or all raise.
        stored, refused = broadcast_object((stored, refused))
        if refused is not None:
            raise ConfigError(refused)
        if stored is not None and stored["rows"] == share:
            chosen = stored["batch_size"]
        else:
            chosen = largest_that_fits(tunable, share)
            if is_main:
                logger.info("micro-batches of %d rows x %d fit", chosen, share // chosen)
        self._choice = {"rows": share, "batch_size": chosen, "accumulation": share // chosen}
        tunable.use_micro_batches(chosen)

    def on_train_start(self, run: Run) -> None:
        """Store the choice in the run folder."""
        if run.accelerator.is_main_process:
            write_atomic(run.run_dir / self.filename, json.dumps(self._choice).encode())


def stored_choice(path: Path) -> dict[str, int] | None:
    """The choice of an earlier start of the run; None if there is none.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not path.is_file():
        return None
    try:
        choice = json.loads(path.read_text())
        return {name: int(choice[name]) for name in ("rows", "batch_size")}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is {path.read_text()!r}, expected an object with rows and batch_size: delete it to "
            "search again"
        ) from error


def largest_that_fits(run: Tunable, share: int) -> int:
    """The largest divisor of ``share`` that every rank can train with. A collective.

    Raises:
        ConfigError: not even one row fits on some rank.
    """
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
    while low < high:
        middle = (low + high) // 2
        fits_here = fits(run, sizes[middle])
        # Every rank gets here, even after a failed trial, and all take the same branch.
        failed = sum_over_ranks([0.0 if fits_here else 1.0], run.accelerator.device)[0]
        if failed:
            high = middle
        else:
            low = middle + 1
    if low == 0:
        raise ConfigError(
            "batch_size_search is 'largest', but not even one row fits into the memory of every rank: turn "
            "it off and use a sharding engine, gradient checkpointing, or smaller views"
        )
    return sizes[low - 1]


def fits(run: Tunable, size: int) -> bool:
    """Whether this rank can train on micro-batches of ``size`` rows. Restores all state afterwards."""
    with untouched(run.model):
        try:
            _trial(run, size)
        except torch.OutOfMemoryError:
            return False
        return True


def _trial(run: Tunable, size: int) -> None:
    device = run.accelerator.device
    run.model.to(device)
    held = _reserve(run.model, run.config, run.accelerator.num_processes, device)
    forward = in_precision(run.model, run.config.precision, device)
    # Memory peaks in the second micro-batch, when the gradients of the first exist.
    for _ in range(2):
        _forward_backward(run, forward, size)
    del held


def _forward_backward(run: Tunable, forward: Callable[..., Any], size: int) -> None:
    rows = [row % len(run.train_data) for row in range(size)]
    (batch,) = load_batches(run.train_data, [rows], seed=run.config.seed, collate=run.collate)
    if run.accelerator.device.type != "cpu":
        from accelerate.utils import send_to_device

        batch = send_to_device(batch, run.accelerator.device)
    sums = [part for part in run.task(forward, batch).sums.values() if part.requires_grad]
    torch.autograd.backward(sums)


def _reserve(model: nn.Module, config: TrainConfig, ranks: int, device: torch.device) -> Tensor | None:
    """Memory that training needs beyond a trial: optimizer state, average, gradient buckets, headroom."""
    if device.type != "cuda":
        return None
    state = OPTIMIZERS[config.optim.name].state_bytes
    each = state + (AVERAGE if config.ema.enabled else 0) + (GRADIENT if ranks > 1 else 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.empty(each * trained + int(HEADROOM * total), dtype=torch.uint8, device=device)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a block, then restore buffers, modes and random states, and drop the gradients."""
    with undisturbed(model):
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
    # Stack frames of a caught error may still reference activations.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
