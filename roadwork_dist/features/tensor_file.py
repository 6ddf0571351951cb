"""One tensor in one safetensors file that carries its checksum: what is kept beside the feature store."""

import hashlib
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def checksum(tensor: Tensor) -> str:
    """Hex SHA-256 of a CPU tensor's bytes, in the order of its elements."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def pack_tensor(tensor: Tensor) -> bytes:
    """A tensor as the content of a safetensors file that carries its checksum."""
    # One key only: safetensors writes several in random order, and equal tensors should give equal files.
    return save({"values": tensor.contiguous()}, metadata={"sha256": checksum(tensor)})


def unpack_tensor(path: Path) -> Tensor | None:
    """Read a tensor written by :func:`pack_tensor`.

    Returns:
        The tensor, or ``None`` where there is no file or where it is damaged; the latter warns.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor("values")
            expected = (file.metadata() or {}).get("sha256")
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{path} is damaged ({error}): it will be computed again", RuntimeWarning, stacklevel=2)
        return None
    if checksum(tensor) != expected:
        warnings.warn(
            f"{path} is damaged (checksum): it will be computed again", RuntimeWarning, stacklevel=2
        )
        return None
    return tensor
