"""Exports a checkpoint's weights as one safetensors file."""

import shutil
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.trainer.checkpoint.tensors import StoredTensors
from roadwork_dist.trainer.engine.base import PrefixedSource

WEIGHTS = "model.safetensors"
_DESCRIPTION = "config.json"
_AVERAGE = "callbacks/EmaCallback/"


def whole_weights(checkpoint: Path, *, average: bool = False) -> dict[str, Tensor]:
    """Whole trained weights and buffers on the CPU, by the bare model's names.

    Args:
        checkpoint: its folder, verified.
        average: moving averages in place of the weights that have one.

    Raises:
        CheckpointError: it cannot be read, or has no average.
    """
    source = StoredTensors(checkpoint)
    averaged = PrefixedSource(_AVERAGE, source).shapes if average else {}
    if average and not averaged:
        raise CheckpointError(f"{checkpoint} holds no average: its run was trained with ema.enabled false")
    weights = {}
    for name in PrefixedSource("model/", source).shapes:
        prefix = _AVERAGE if name in averaged else "model/"
        weights[name] = source.whole(prefix + name).to(source.dtypes[f"model/{name}"])
    return weights


def consolidate(checkpoint: Path, output: Path, *, average: bool = False) -> Path:
    """Write a checkpoint's weights as one safetensors file.

    The model description in the run's ``best/``, if any, is copied as well, so a detector can be loaded from
    the folder just as from ``best/``.

    Args:
        checkpoint: its folder, verified.
        output: folder to write to; created if needed.
        average: moving averages in place of the weights.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the folder cannot be written.
    """
    weights = whole_weights(checkpoint, average=average)
    description = checkpoint.parent.parent / "best" / _DESCRIPTION
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(output / WEIGHTS, save(weights))
        if description.is_file():
            shutil.copyfile(description, output / _DESCRIPTION)
    except OSError as error:
        raise CheckpointError(
            f"weights cannot be written to {output} ({error.strerror or error}): make room or choose another "
            "folder"
        ) from error
    return output / WEIGHTS
