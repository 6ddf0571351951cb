"""Random generators that a data set keeps itself, and seeds for them and for the global ones.

Copied into loader processes, such a generator would give the same draws in each of them and others after a
resume. Here every one is seeded for each row, as the global generators are.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from roadwork_dist.common.random import derive_seed

DEPTH = 4
"""Objects inside objects that are searched: data set, wrapper, list of transforms, transform."""

_Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def generators_of(dataset: Any) -> list[_Generator]:
    """Generators in attributes of a data set, of those inside it and of its transforms; each once."""
    found: dict[int, _Generator] = {}
    _search(dataset, DEPTH, found, set())
    return list(found.values())


def seed_row(generators: list[_Generator], *parts: int | str) -> None:
    """Seed Python's, numpy's and torch's global CPU generators and the given ones by names."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    for number, generator in enumerate(generators):
        own = derive_seed(*parts, "generator", number)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own)
        elif isinstance(generator, np.random.Generator):
            kind = type(generator.bit_generator)
            generator.bit_generator.state = kind(own).state
        elif isinstance(generator, np.random.RandomState):
            generator.seed(own % 2**32)
        else:
            generator.seed(own)


def _search(value: Any, depth: int, found: dict[int, _Generator], seen: set[int]) -> None:
    if isinstance(value, _Generator):
        found[id(value)] = value
        return
    if depth < 0 or id(value) in seen:
        return
    seen.add(id(value))
    for inner in _inside(value):
        _search(inner, depth - 1, found, seen)


def _inside(value: Any) -> Iterator[Any]:
    """What may hold generators: attributes of plain objects, and short lists of such objects."""
    if isinstance(value, Tensor | np.ndarray | str | bytes | type | nn.Parameter):
        return
    if isinstance(value, dict):
        yield from list(value.values())[:_MOST]
    elif isinstance(value, list | tuple):
        yield from value[:_MOST]
    elif hasattr(value, "__dict__"):
        yield from vars(value).values()
    if isinstance(value, ConcatDataset):
        yield from value.datasets


_MOST = 64
"""Elements of a list that are looked at: transforms, not rows."""
