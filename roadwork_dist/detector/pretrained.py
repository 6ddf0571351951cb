"""Saving and loading a trained model as a folder: ``model.safetensors`` and ``config.json``.

The folder holds the trained weights. Of a frozen backbone it holds only the identity; the caller
loads that backbone and passes it in.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from roadwork_dist.common.errors import CheckpointError, ConfigError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.config.experiment import ModelConfig

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
FORMAT = 1
"""Version of ``config.json``; incremented when an older reader would misread it."""


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """Content of ``config.json``."""

    d_backbone: int
    """Width D of the features that the head takes."""
    mask_head: bool
    """Whether the model has a mask head."""
    model: ModelConfig
    """Settings of the head."""
    backbone: dict[str, Any] = field(default_factory=dict)
    """Identity of the backbone, as given when the model was saved."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Additional data given when the model was saved."""


def write_pretrained(folder: Path, config: PretrainedConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a model folder; each file is replaced atomically.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    text = json.dumps({"format": FORMAT, **asdict(config)}, indent=2, sort_keys=True) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / WEIGHTS_FILE, save(tensors))
        write_atomic(folder / CONFIG_FILE, text.encode())
    except OSError as error:
        raise CheckpointError(
            f"the model cannot be written to {folder} ({error}): choose a writable folder with enough "
            "free space"
        ) from error


def read_config(folder: Path) -> PretrainedConfig:
    """Read ``config.json``, for example to learn which backbone the model needs.

    Raises:
        CheckpointError: it is missing, damaged, or of another format version.
    """
    path = folder / CONFIG_FILE
    try:
        content = json.loads(path.read_bytes())
        version = content.pop("format")
        if version != FORMAT:
            raise CheckpointError(
                f"{path} has format {version!r}, expected {FORMAT}: it was written by another version "
                "of roadwork_dist; install that one"
            )
        return PretrainedConfig(**{**content, "model": ModelConfig(**content["model"])})
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} does not exist: expected a folder written by save_pretrained, such as a run's best/"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): expected what save_pretrained writes; save the model again"
        ) from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of ``model.safetensors`` onto the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    path = folder / WEIGHTS_FILE
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): the model is incomplete or damaged; save it again"
        ) from error


def load_into(module: torch.nn.Module, weights: Mapping[str, Tensor], folder: Path, *, strict: bool) -> None:
    """Load tensors into a module; every name and shape must match.

    Args:
        module: receives the weights.
        weights: tensors by their names in the module.
        folder: where they come from, for error messages.
        strict: also require a weight for everything in the module's state dict.

    Raises:
        CheckpointError: a name or a shape does not match.
    """
    try:
        result = module.load_state_dict(dict(weights), strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {folder} do not fit the model: {error}") from error
    if result.unexpected_keys:
        raise CheckpointError(
            f"the weights in {folder} do not fit the backbone: it has no {', '.join(result.unexpected_keys)}"
        )
