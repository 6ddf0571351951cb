"""The largest micro-batch that fits, found by trying.

An optimizer step keeps its rows: a rank's share of them (``batch_size * accumulation``) is dealt out in
micro-batches of another size. Which rows a step trains on does not depend on that, but draws inside the
model (dropout) do, so a run that goes on takes the size that it began with.
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
from roadwork_dist.trainer.config import TrainConfig
from roadwork_dist.trainer.engine.collectives import broadcast_object, sum_over_ranks
from roadwork_dist.trainer.engine.precision import in_precision
from roadwork_dist.trainer.events.callback import Callback, Run
from roadwork_dist.trainer.feed.dataset import MapDataset
from roadwork_dist.trainer.feed.loader import load_batches
from roadwork_dist.trainer.optim.optimizers import OPTIMIZERS
from roadwork_dist.trainer.undisturbed import undisturbed

logger = logging.getLogger(__name__)

GRADIENT = AVERAGE = 4
"""Bytes a trained parameter of gradient and average, which are fp32."""

HEADROOM = 0.05
"""Share of a GPU's memory that is left free, for what grows later (fragments, wider batches)."""


class Tunable(Run, Protocol):
    """What a trial needs of the Trainer besides what observers see."""

    train_data: MapDataset
    collate: Callable[[list[Any]], Any] | None
    task: Any

    def use_micro_batches(self, batch_size: int) -> None:
        """Deal each step's rows out in micro-batches of this size from now on."""


class BatchSizeSearch(Callback):
    """Chooses the micro-batch before the model is spread over the ranks.

    Every rank tries the whole model by itself, without a collective in it, so a rank that runs out of
    memory leaves nobody waiting; what fits on all ranks is taken. Trials leave weights, moments, batch
    statistics and random states as they were. Engines that shard need less than the trial does.
    """

    filename = "batch_size.json"

    def __init__(self) -> None:
        self._choice: dict[str, int] | None = None

    def on_setup(self, run: Run) -> None:
        """Take the size that the run folder knows, else search.

        Raises:
            ConfigError: not even one row fits, or the stored choice cannot be read.
        """
        tunable = cast(Tunable, run)
        share = run.config.batch_size * run.config.accumulation
        is_main = run.accelerator.is_main_process
        stored, refused = None, None
        if is_main and run.config.resume == "auto":
            try:
                stored = stored_choice(run.run_dir / self.filename)
            except ConfigError as error:
                refused = str(error)
        # One reads, so that all take the same; all get here, so all refuse together.
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
        """Keep the choice in the run folder."""
        if run.accelerator.is_main_process:
            write_atomic(run.run_dir / self.filename, json.dumps(self._choice).encode())


def stored_choice(path: Path) -> dict[str, int] | None:
    """What an earlier start of the run chose; None where there was none.

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
        # Every rank ends its trial, whatever came of it, and gets here; all take the same branch.
        failed = sum_over_ranks([0.0 if fits_here else 1.0], run.accelerator.device)[0]
        if failed:
            high = middle
        else:
            low = middle + 1
    if low == 0:
        raise ConfigError(
            "batch_size_search is 'largest', but not even one row fits into the memory of every rank: turn "
            "it off and choose an engine that shards, gradient checkpointing, or smaller views"
        )
    return sizes[low - 1]


def fits(run: Tunable, size: int) -> bool:
    """Whether this rank can train on micro-batches of ``size`` rows. Leaves everything as it was."""
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
    # The fullest moment is the second micro-batch's, when the gradients of the first are there.
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
    """Memory that training holds besides what a trial does: optimizer state, average, buckets, headroom."""
    if device.type != "cuda":
        return None
    state = OPTIMIZERS[config.optim.name].state_bytes
    each = state + (AVERAGE if config.ema.enabled else 0) + (GRADIENT if ranks > 1 else 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.empty(each * trained + int(HEADROOM * total), dtype=torch.uint8, device=device)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run a block, then put back buffers, modes and random states and drop the gradients."""
    with undisturbed(model):
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
    # Frames of an error that was caught may still hold activations.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
