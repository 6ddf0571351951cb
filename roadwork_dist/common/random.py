"""Reproducible random number generators, and saving and restoring the global ones.

Draws for a sample, a view or an epoch come from generators seeded by those names, so they do not
depend on the worker, the rank or the point of resume. Generators that depend on history (dropout's)
are captured and restored as a whole.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import numpy as np
import torch


class RngState(TypedDict):
    """State of every global generator of one process, in types that ``torch.load`` reads safely."""

    python: tuple[object, ...]
    numpy: tuple[torch.Tensor, int, int, float]  # key, position, has_gauss, cached_gaussian
    torch: torch.Tensor
    cuda: torch.Tensor | None  # of the device of this process


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed, a pure function of ``parts`` (BLAKE2b of their text)."""
    text = "\x1f".join(str(part) for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*parts: int | str) -> np.random.Generator:
    """A numpy generator seeded by :func:`derive_seed` of ``parts``."""
    return np.random.default_rng(derive_seed(*parts))


def torch_generator_for(*parts: int | str) -> torch.Generator:
    """A CPU torch generator seeded by :func:`derive_seed` of ``parts``."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_rng() -> RngState:
    """State of the global generators, for :func:`restore_rng`."""
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)  # legacy=True: ("MT19937", key, position, has_gauss, cached_gaussian)
    _, key, position, has_gauss, cached = state
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(key.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_rng(state: RngState) -> None:
    """Restore the global generators to a captured state.

    A CUDA state goes to this process's device, whatever its index at capture and however many are visible.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))  # type: ignore[arg-type]
    key, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", key.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Run a block with the global CPU generators seeded by ``seed``, then restore them."""
    python, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
