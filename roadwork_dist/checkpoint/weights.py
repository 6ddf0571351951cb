"""Which tensors of a model training moves, and who the others are."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from roadwork_dist.common.errors import CheckpointError


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that training may move: trainable parameters, and buffers of modules in train mode.

    Call it with the model in train mode. A frozen part that stays in eval mode then keeps its
    buffers (running statistics) out.
    """
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    stored = model.state_dict(keep_vars=True)
    for prefix, module in model.named_modules():
        if module.training:
            for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
                if name in stored:
                    tensors[name] = buffer.detach()
    return tensors


def frozen_identity(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all stored tensors that training cannot move.

    A model that is trained from kept features does not hold the network they come from; it names it
    in an attribute ``backbone_identity``, which counts too.
    """
    # By memory, not by name: weights that two modules share have two names, one of which moves.
    moved = {tensor.data_ptr() for tensor in trained_tensors(model).values() if tensor.numel()}
    elsewhere = json.dumps(getattr(model, "backbone_identity", None), sort_keys=True)
    digest = hashlib.sha256(elsewhere.encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.numel() or tensor.data_ptr() not in moved:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


@torch.no_grad()
def load_trained_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors of :func:`trained_tensors` back into a model, in place.

    Raises:
        CheckpointError: names or shapes differ.
    """
    own = trained_tensors(model)
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    if missing or unknown or wrong:
        raise CheckpointError(
            f"the checkpoint is of another model: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"other shape {sorted(wrong)[:3]}; train into another output_dir"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])
