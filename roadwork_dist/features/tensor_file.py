"""Read and write safetensors files of one tensor and its checksum, cached next to the feature store."""

import hashlib
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def checksum(tensor: Tensor) -> str:
    """Hex SHA-256 of a CPU tensor's bytes in element order."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def pack_tensor(tensor: Tensor) -> bytes:
    """Serialize a tensor as a safetensors file that includes its checksum."""
    # Only one key: safetensors writes several in random order, but equal tensors must give equal files.
    return save({"values": tensor.contiguous()}, metadata={"sha256": checksum(tensor)})


def unpack_tensor(path: Path) -> Tensor | None:
    """Read a tensor written by :func:`pack_tensor`.

    Returns:
        The tensor; ``None`` if there is no file, or, with a warning, if it is damaged.
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
