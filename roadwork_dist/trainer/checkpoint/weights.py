"""Separates a model's trained tensors from the frozen ones, and identifies the latter by a hash."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from roadwork_dist.common.errors import CheckpointError
from roadwork_dist.trainer.engine.base import trained_parameters


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that training may change: trainable parameters, and buffers of modules in train mode.

    Call it with the model in train mode. Buffers (running statistics) of a frozen part that stays in
    eval mode are then excluded.
    """
    return {name: p.detach() for name, p in trained_parameters(model).items()} | trained_buffers(model)


def trained_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that training may change; the model has to be in train mode."""
    tensors = {}
    stored = model.state_dict(keep_vars=True)
    for prefix, module in model.named_modules():
        if module.training:
            for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
                if name in stored:
                    tensors[name] = buffer.detach()
    return tensors


def frozen_identity(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all stored tensors that training cannot change.

    A model trained from stored features does not hold the network that computed them. It names that
    network in an attribute ``backbone_identity``, which is hashed too.
    """
    # By memory, not by name: weights that two modules share have two names, one of which is trained.
    moved = {tensor.data_ptr() for tensor in trained_tensors(model).values() if tensor.numel()}
    elsewhere = json.dumps(getattr(model, "backbone_identity", None), sort_keys=True)
    digest = hashlib.sha256(elsewhere.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):  # a module's extra state, which is not checked
            continue
        if not tensor.numel() or tensor.data_ptr() not in moved:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_same_model(own: Mapping[str, torch.Size], stored: Mapping[str, torch.Size], folder: Path) -> None:
    """Compare the trained tensors of a model with those of a checkpoint.

    Args:
        own: shapes of :func:`trained_tensors`, by name.
        stored: shapes in the checkpoint, by name.
        folder: of the checkpoint, for the message.

    Raises:
        CheckpointError: names or shapes differ.
    """
    missing, unknown = sorted(own.keys() - stored.keys()), sorted(stored.keys() - own.keys())
    wrong = sorted(n for n in own.keys() & stored.keys() if own[n] != stored[n])
    if missing or unknown or wrong:
        raise CheckpointError(
            f"{folder} is of another model: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"other shape {wrong[:3]}; train into another output_dir"
        )
