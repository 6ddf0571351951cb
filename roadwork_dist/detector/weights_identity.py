"""Content hash that identifies a network: its architecture and its weights."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_identity(architecture: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of an architecture and its weights.

    Args:
        architecture: everything that changes the function without changing a tensor (number of
            heads, activation, ...); must be representable as JSON.
        tensors: weights and buffers by name; name, shape, dtype and bytes of each are hashed.

    Tensors on the meta device have no bytes; the hash then starts with ``meta-``.
    """
    digest = hashlib.sha256(json.dumps(dict(architecture), sort_keys=True, default=str).encode())
    has_meta = False
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"\x1f{name}\x1f{tuple(tensor.shape)}\x1f{tensor.dtype}\x1f".encode())
        if tensor.is_meta:
            has_meta = True
        else:
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return f"meta-{digest.hexdigest()}" if has_meta else digest.hexdigest()
