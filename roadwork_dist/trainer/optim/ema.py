"""Exponential moving average of trained weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from roadwork_dist.trainer.config import EmaConfig


class ExponentialMovingAverage:
    """fp32 shadow of trained weights, whatever their dtype (complex64 of complex ones).

    ``shadow = d * shadow + (1 - d) * weight`` once per optimizer step, with
    ``d = min(decay, (1 + n) / (10 + n))`` after n updates while warming up (the rule of
    TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``). Element-wise, so a process that
    holds shards of the weights keeps the average of those shards.

    Args:
        weights: by name; they share memory with what trains and are read at every update.
        config: decay and warm-up.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: EmaConfig) -> None:
        self.config = config
        self.updates = 0
        self._names = list(weights)
        self._weights = list(weights.values())
        self._shadow = [_precise(weight.detach()).clone() for weight in self._weights]
        self._is_fp32 = all(weight.dtype == torch.float32 for weight in self._weights)

    def decay_at(self, updates: int) -> float:
        """Decay used by the update that follows ``updates`` earlier ones."""
        if not self.config.warmup:
            return self.config.decay
        return min(self.config.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move the shadow towards the weights as they are now."""
        weight = 1 - self.decay_at(self.updates)
        if self._shadow:  # a rank may hold no shard at all
            current = self._weights if self._is_fp32 else [_precise(w) for w in self._weights]
            torch._foreach_lerp_(self._shadow, current, weight)
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Run a block with the average in the memory of the weights."""
        held = [weight.detach().clone() for weight in self._weights]
        self._set(self._shadow)  # copied: bf16 weights must not round the shadow itself
        try:
            yield
        finally:
            self._set(held)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)

    def restart(self) -> None:
        """Start again from the weights as they are now."""
        self.updates = 0
        for shadow, weight in zip(self._shadow, self._weights, strict=True):
            shadow.copy_(weight)

    def shadow(self) -> dict[str, Tensor]:
        """The average by the weights' names, fp32, in its own memory."""
        return dict(zip(self._names, self._shadow, strict=True))


def _precise(weight: Tensor) -> Tensor:
    return weight.to(torch.complex64 if weight.is_complex() else torch.float32)
