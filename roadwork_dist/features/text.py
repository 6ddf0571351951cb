"""Sentence embeddings of the descriptions, computed once by a frozen encoder.

The caller passes the encoder as a function. N rows · T unique texts
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from roadwork_dist.common.errors import BackboneError
from roadwork_dist.common.files import write_atomic
from roadwork_dist.config.batch import TEXT_WIDTH
from roadwork_dist.features.store.locks import unless_read_only

TextEncoder = Callable[[list[str]], Tensor]
"""list of T texts -> [T, TEXT_WIDTH]"""


@dataclass(frozen=True)
class TextEmbeddings:
    """Embeddings of the rows of a manifest."""

    values: Tensor
    """[N, TEXT_WIDTH] float32; 0 where the description is None."""
    known: Tensor
    """[N] bool."""


class TextCache:
    """Embeddings on disk, one file per encoder.

    Args:
        folder: folder of the file.
        encoder: identity of the encoder: its name and the hash of its weights.
    """

    def __init__(self, folder: Path | str, encoder: str) -> None:
        self.encoder = encoder
        name = hashlib.sha256(encoder.encode()).hexdigest()[:20]
        self.path = Path(folder) / f"text-{name}.safetensors"

    def load(self) -> dict[str, Tensor]:
        """Embeddings by hash of their text; empty, with a warning, if the file is damaged."""
        try:
            with safe_open(self.path, framework="pt") as file:
                keys = (file.metadata() or {}).get("keys", "").split()
                values = file.get_tensor("values")
                checksum = (file.metadata() or {}).get("sha256")
        except FileNotFoundError:
            return {}
        except (SafetensorError, OSError) as error:
            warnings.warn(f"{self.path} is damaged ({error}): texts are embedded again", stacklevel=2)
            return {}
        if checksum != _checksum(values) or len(keys) != len(values):
            warnings.warn(f"{self.path} is damaged (checksum): texts are embedded again", stacklevel=2)
            return {}
        return dict(zip(keys, values, strict=True))

    def save(self, found: dict[str, Tensor]) -> None:
        """Add embeddings; those added concurrently by another process may be lost, but never corrupted."""
        merged = {**self.load(), **found}
        values = torch.stack(list(merged.values()))
        metadata = {"encoder": self.encoder, "keys": " ".join(merged), "sha256": _checksum(values)}
        with unless_read_only(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, save({"values": values}, metadata=metadata))


def embed_descriptions(
    descriptions: Sequence[str | None],
    encode: TextEncoder,
    cache: TextCache | None = None,
    batch_size: int = 64,
) -> TextEmbeddings:
    """Embed descriptions, each distinct text once.

    Args:
        descriptions: one per row; ``None`` = no description.
        encode: the frozen sentence encoder; not called if the cache has every text.
        cache: stores embeddings between runs.
        batch_size: texts per call of ``encode``.

    Raises:
        BackboneError: the encoder's width is not TEXT_WIDTH.
    """
    keys = [None if text is None else hashlib.sha256(text.encode()).hexdigest() for text in descriptions]
    texts = {key: text for key, text in zip(keys, descriptions, strict=True) if key and text is not None}
    known = {} if cache is None else cache.load()
    missing = [key for key in texts if key not in known]
    found: dict[str, Tensor] = {}
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        embedded = encode([texts[key] for key in batch]).detach().to("cpu", torch.float32)
        if embedded.shape != (len(batch), TEXT_WIDTH):
            raise BackboneError(
                f"the text encoder gave {tuple(embedded.shape)} for {len(batch)} texts, expected "
                f"({len(batch)}, {TEXT_WIDTH}): set data.text_encoder to one of width {TEXT_WIDTH}"
            )
        found |= dict(zip(batch, embedded, strict=True))
    if found and cache is not None:
        cache.save(found)
    known |= found
    values = torch.zeros(len(keys), TEXT_WIDTH)
    for row, key in enumerate(keys):
        if key is not None:
            values[row] = known[key]
    return TextEmbeddings(values, torch.tensor([key is not None for key in keys], dtype=torch.bool))


def _checksum(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
