"""Features of the frozen backbone, kept on disk (V views of a photo, D width of the backbone).

One safetensors file per photo and copy: ``<root>/<key of the space>/<plain|copy-k>/<aa>/<hash>.safetensors``.
Files are written whole or not at all, carry a checksum, and are the same whoever writes them, so
several processes can share a store, and a run that was killed goes on where it was.
"""

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from roadwork_dist.common.errors import ConfigError, DataError
from roadwork_dist.common.files import write_atomic

STORED_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class FeatureSpace:
    """All that decides the value of a stored feature besides the photo itself.

    Args:
        views: :meth:`ViewGeometry.identity`.
        augment: :meth:`Augmenter.identity`, or ``None`` for views as they are.
        backbone: identity of the backbone: architecture, hash of its weights, arithmetic.
        dtype: stored type.
    """

    views: dict[str, object]
    augment: dict[str, object] | None
    backbone: str
    dtype: Literal["bf16", "fp32"]

    def describe(self) -> str:
        """The fields as JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True, indent=1)

    @property
    def key(self) -> str:
        """Name of the space's folder: 20 hex digits of the SHA-256 of :meth:`describe`."""
        return hashlib.sha256(self.describe().encode()).hexdigest()[:20]


def checksum(tensor: Tensor) -> str:
    """Hex SHA-256 of a CPU tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


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


class FeatureStore:
    """The features of one space.

    Args:
        root: folder that all spaces share.
        space: what the features are of; written to ``manifest.json`` in the space's folder.

    Raises:
        ConfigError: the folder cannot be written.
    """

    def __init__(self, root: Path | str, space: FeatureSpace) -> None:
        self.space = space
        self.folder = Path(root) / space.key
        manifest = self.folder / "manifest.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not manifest.exists():
                write_atomic(manifest, space.describe().encode())
        except OSError as error:
            raise ConfigError(
                f"the feature store {root} cannot be written ({error}): set features.dir to a folder with "
                "room that you may write, or features.mode to online"
            ) from error

    def path(self, content_hash: str, sample_id: str, copy: int | None) -> Path:
        """Where the features of a photo are.

        Un-augmented features belong to the photo's content alone; augmented ones also to the
        sample's id, which their draws depend on.

        Args:
            content_hash: hash of the photo's bytes.
            sample_id: id of the sample.
            copy: augmented copy; ``None`` exactly where the space has no augmentation.

        Raises:
            ValueError: ``copy`` does not fit the space.
        """
        if (copy is None) != (self.space.augment is None):
            raise ValueError(f"copy is {copy} in a feature space with augment={self.space.augment}")
        if copy is None:
            name, folder = content_hash, "plain"
        else:
            name = hashlib.sha256(f"{content_hash}\x1f{sample_id}".encode()).hexdigest()
            folder = f"copy-{copy}"
        return self.folder / folder / name[:2] / f"{name}.safetensors"

    def has(self, content_hash: str, sample_id: str, copy: int | None) -> bool:
        """Whether the features are there and whole; a damaged file warns and counts as absent."""
        return unpack_tensor(self.path(content_hash, sample_id, copy)) is not None

    def get(self, content_hash: str, sample_id: str, copy: int | None) -> Tensor:
        """Read the features of a photo.

        Returns:
            [V, D] in the stored type.

        Raises:
            DataError: they are absent or damaged.
        """
        path = self.path(content_hash, sample_id, copy)
        features = unpack_tensor(path)
        if features is None:
            raise DataError(
                f"sample {sample_id!r}: its stored features ({path}) are absent or damaged: start the same "
                "command again, it computes what is missing"
            )
        return features

    def put(self, content_hash: str, sample_id: str, copy: int | None, features: Tensor) -> None:
        """Write the features of a photo: [V, D] of any floating type and device.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        path = self.path(content_hash, sample_id, copy)
        stored = features.detach().to("cpu", STORED_DTYPES[self.space.dtype])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, pack_tensor(stored))
